// Functions for sm_90a that do what the tcgen05 instructions of the family sm_100f do. Only those of one
// CTA (cta_group::1) and, of the MMAs, only kind::f16.
//
// translate.py replaces each instruction of a kernel's PTX by a call of one of these functions.
// Everything else of the kernel is executed as it is: TMA, mbarriers, clusters, multicast.
//
//  - Tensor memory is global memory, 128 lanes x 512 columns for each multiprocessor, allocated in
//    units of 32 columns. Columns hold NaN when they have been allocated.
//  - An MMA reads its operands through the decoded descriptors. It runs on mma.sync in the issuing
//    warp, or with fused multiply-adds in the issuing thread where one thread calls it alone.
//  - When MMAs, commits and copies happen is chosen by MODE_*; interface.py says what each means.
//    Work that is put off is done by threads that have to wait: nothing runs in the background.
//  - Errors are counted by kind. A wait that does not end is one: then all waits end at once, and
//    the kernel ends with wrong results instead of not at all.
//
// Not modelled: fences and proxies (they order nothing here), the rounding of the real unit, time.

#include "copies.cuh"
#include "machine.cuh"
#include "queue.cuh"
#include "tensor_memory.cuh"

// --- waiting ---

static __device__ bool complete(u32 barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, "
        "p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done;
}

// Returns when the barrier's phase of this parity is complete, for all threads that call together.
//
// Puts work off as long as possible: first it waits, then the copies to this barrier begin, then
// the warp's queued MMAs run up to one commit; at last the CTA's other copies begin.
extern "C" __device__ __noinline__ void tc_wait(u32 barrier, u32 parity) {
    const u32 together = __activemask(), leader = __ffs(together) - 1, slot = warp_slot();
    Watch watch;
    int alike;
    __match_all_sync(together, (u64)barrier << 32 | parity, &alike);
    for (u32 round = 0; alike; ++round) {
        u32 found = 0;
        if (lane() == leader) {
            if (complete(barrier, parity) || watch.over(barrier, parity))
                found = 1;
            else if (nanoseconds() - watch.begun > PATIENCE)
                found = 2;
        }
        found = __shfl_sync(together, found, leader);
        __syncwarp(together);
        if (found == 1) return;
        bool busy = mode(MODE_LATE_COPY) && begin_copies(together, barrier, found == 2);
        // While threads of the warp are missing, its MMAs stay queued and the wait goes on: a
        // thread may come late. If one never comes, this wait is reported as a timeout.
        if (!busy && round % 4 == 3 && waits_for_warp(slot) &&
            gathered(QUEUED_WORK, together, MEETING))
            drain(slot, false), busy = true;
        if (!busy) __nanosleep(200);
    }
    // Threads that wait for different things: each for its own, and nothing is put off further.
    while (!complete(barrier, parity) && !watch.over(barrier, parity))
        begin_copies(1u << lane(), barrier, true);
}

// Before a test of a barrier that does not wait: what the barrier waits for makes progress.
extern "C" __device__ __noinline__ void tc_poll(u32 barrier) {
    const u32 together = __activemask();
    if (mode(MODE_LATE_COPY)) begin_copies(together, barrier, true);
    if (together == ALL && waits_for_warp(warp_slot())) drain(warp_slot(), false);
}

// Before a barrier of the CTA or the cluster, and before the end: the warp's queue is executed.
extern "C" __device__ __noinline__ void tc_settle() {
    const u32 slot = warp_slot(), together = __activemask();
    if (!mode(MODE_DEEP_MMA) || !waits_for_warp(slot)) return;
    if (gathered(QUEUED_WORK, together, limit()))
        drain(slot, true);
    else
        fail(ERROR_DIVERGED, together);
}

// --- entry ---

// All threads of a CTA, before anything else.
extern "C" __device__ __noinline__ void tc_enter() {
    if (!mode(MODE_POISON)) return;
    const u32 threads = blockDim.x * blockDim.y * blockDim.z;
    const u32 end = min(shared_end(), RESERVED + dynamic_size());
    for (u32 at = RESERVED + thread() * 4; at + 4 <= end; at += threads * 4) {
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(at | rank() << 24), "r"(NAN_BITS) : "memory");
    }
    // Copies may overwrite it next.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
}
