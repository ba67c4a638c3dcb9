// What every part of the model uses: types, tables, the identity of the calling thread, errors,
// and time limits of waits.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

// Settings: mode bits, milliseconds until a wait has failed, CTAs of a cluster.
enum Setting { MODE, LIMIT_MS, CLUSTER, SETTINGS };
// What a caller says about an MMA or a commit. WARP: all threads of the warp call, and the one with
// LEADER means it; without WARP, the calling thread alone. MASKED: some lanes of the accumulator are
// not to be written, which is not modelled.
enum Flag { ACCUMULATE = 1, LEADER = 2, WARP = 4, COMMIT = 8, MASKED = 16 };
enum State : u32 { FREE, BUSY, READY };

constexpr u32 LANES = 128, COLUMNS = 512, UNIT = 32, ALL = 0xffffffffu;
// The system's part at the start of shared memory, in bytes.
constexpr u32 RESERVED = 1024;
constexpr u32 NAN_BITS = 0x7fc0deadu;
// A commit without a mask goes to the CTA's own barrier.
constexpr u32 OWN_BARRIER = ~0u;
// Nanoseconds of a wait until it begins copies that other CTAs may wait for.
constexpr u64 PATIENCE = 10000000;
// Nanoseconds between two tries of a wait to find all threads of its warp waiting.
constexpr u64 MEETING = 20000;

// A queued MMA; or a queued commit, with its barrier in d.
struct Step {
    u64 a, b;
    u32 d, instruction, flags, mask;
};
// A copy from global memory that has not begun. source: the address, or that of the tensor map.
struct Copy {
    u64 source, cta;
    u32 state, kind, target, barrier, size, x, y, mask;
};
enum Kind : u32 { BULK, BULK_MULTICAST, TILE, TILE_MULTICAST };

extern "C" {
__device__ u32 tc_settings[SETTINGS];
__device__ u64 tc_counts[FIRST_ERROR + ERRORS];
__device__ u32 tc_places[ERRORS * PLACE_WORDS];
__device__ u32 tc_abandoned;
__device__ u32 tc_memory[MULTIPROCESSORS * LANES * COLUMNS];
__device__ u32 tc_taken[MULTIPROCESSORS];  // a bit for each unit of columns
__device__ u64 tc_owner[MULTIPROCESSORS * (COLUMNS / UNIT)];
__device__ Step tc_queue[MULTIPROCESSORS * WARPS * QUEUE];
__device__ u32 tc_first[MULTIPROCESSORS * WARPS];   // of the queue: the oldest step
__device__ u32 tc_queued[MULTIPROCESSORS * WARPS];  // of the queue: the end
__device__ Copy tc_copies[MULTIPROCESSORS * COPIES];
__device__ u32 tc_pending[MULTIPROCESSORS];  // copies that have not begun
__device__ u32 tc_gathered[MULTIPROCESSORS * WARPS * 2];  // threads, as bits: see gathered()
}

#define SPECIAL(name, type, constraint, text)              \
    static __device__ type name() {                        \
        type value;                                        \
        asm volatile("mov." text ";" : constraint(value)); \
        return value;                                      \
    }
SPECIAL(multiprocessor, u32, "=r", "u32 %0, %%smid")
SPECIAL(hardware_warp, u32, "=r", "u32 %0, %%warpid")
SPECIAL(lane, u32, "=r", "u32 %0, %%laneid")
SPECIAL(grid, u64, "=l", "u64 %0, %%gridid")
SPECIAL(cycles, u32, "=r", "u32 %0, %%clock")
SPECIAL(nanoseconds, u64, "=l", "u64 %0, %%globaltimer")

// Constants of a CTA, which the compiler may read once.
static __device__ u32 rank() {
    u32 v;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(v));
    return v;
}
static __device__ u32 shared_end() {
    u32 v;
    asm("mov.u32 %0, %%aggr_smem_size;" : "=r"(v));
    return v;
}
static __device__ u32 dynamic_size() {
    u32 v;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(v));
    return v;
}

static __device__ u32 thread() {
    return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
}
// Different for any two CTAs that are resident at once, of one launch or of two.
static __device__ u64 identity() {
    const u32 number = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    return grid() << 24 | (number + 1);
}
static __device__ u32 warp_slot() { return multiprocessor() * WARPS + hardware_warp() % WARPS; }
static __device__ u32 current(const u32* word) { return *(const volatile u32*)word; }
static __device__ bool mode(u32 flag) { return tc_settings[MODE] & flag; }
static __device__ u64 limit() { return tc_settings[LIMIT_MS] * 1000000ull; }

static __device__ void count(u32 what, u64 by = 1) { atomicAdd(&tc_counts[what], by); }

// Counts an error; the first of its kind says where it happened, and three words about it.
static __device__ __noinline__ void fail(u32 error, u32 a = 0, u32 b = 0, u32 c = 0) {
    if (atomicAdd(&tc_counts[error], 1ull)) return;
    u32* place = tc_places + (error - FIRST_ERROR) * PLACE_WORDS;
    place[0] = blockIdx.x, place[1] = blockIdx.y, place[2] = blockIdx.z, place[3] = thread();
    place[4] = a, place[5] = b, place[6] = c, place[7] = rank();
}

// What a warp comes together for: to execute one instruction, or what it has put off.
enum Purpose : u32 { INSTRUCTION, QUEUED_WORK };

// Whether all threads of the warp call this within `patience` nanoseconds, for one purpose. The threads
// of `together` call it at once; they return with all others, or after that time without them.
//
// Threads of a warp that run the same code need not run it at the same time: one that has just had
// work of its own comes later. Only a thread that does not come at all is missing.
static __device__ __noinline__ bool gathered(Purpose purpose, u32 together, u64 patience) {
    if (together == ALL) return true;
    u32* present = &tc_gathered[warp_slot() * 2 + purpose];
    const u32 own = 1u << lane();
    const u64 begun = nanoseconds();
    atomicOr(present, own);
    while (current(present) != ALL) {
        if (nanoseconds() - begun < patience) {
            __nanosleep(100);
            continue;
        }
        // Leaves, unless the last thread has come meanwhile.
        const u32 before = current(present);
        if (before != ALL && atomicCAS(present, before, before & ~own) == before) return false;
    }
    __syncwarp();
    if (lane() == 0) atomicExch(present, 0u);
    __syncwarp();
    return true;
}

static __device__ u32 random_bits() {
    const u32 random = (cycles() ^ multiprocessor() * 0x9e3779b9u) * 0x85ebca6bu;
    return random ^ random >> 15;
}
// Sometimes sleeps, up to 16 microseconds.
static __device__ void delay() {
    const u32 random = random_bits();
    if (random & 1) __nanosleep(random >> 18);
}
// Like delay(), and seldom for milliseconds, in which a warp that issues MMAs gets several chunks
// ahead: one that does not wait for a reader of its sums overwrites them.
static __device__ void long_delay() {
    if (random_bits() % 512) return delay();
    for (u32 i = 0; i < 4; ++i) __nanosleep(1000000);
}

// Reports that a wait has taken too long. From then on, every wait of the launch ends at once.
struct Watch {
    u64 begun = nanoseconds();
    __device__ bool over(u32 barrier, u32 parity) {
        if (current(&tc_abandoned)) return true;
        if (nanoseconds() - begun < limit()) return false;
        u64 state = 0;
        if (barrier)
            asm volatile("ld.volatile.shared.b64 %0, [%1];"
                         : "=l"(state)
                         : "r"(barrier)
                         : "memory");
        fail(ERROR_TIMEOUT, barrier & 0xffffff, parity, (u32)(state >> 32));
        atomicExch(&tc_abandoned, 1u);
        return true;
    }
};
