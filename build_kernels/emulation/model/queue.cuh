// MMAs and commits: executed where they are issued, or put off in a queue for each warp.
#pragma once

#include "machine.cuh"
#include "multiply.cuh"
#include "tensor_memory.cuh"

// One thread: an arrival at the barrier of each CTA of the mask.
static __device__ void arrive(u32 barrier, u32 mask) {
    __threadfence();
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (mask == OWN_BARRIER) {
        count(COUNT_ARRIVALS);
        asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
                     : "memory");
        return;
    }
    const u32 cluster = tc_settings[CLUSTER], turn = mode(MODE_SLOW) ? cycles() % 16 : 0;
    if (mask >> cluster) fail(ERROR_MASK, mask, cluster);
    for (u32 i = 0; i < 16; ++i) {
        const u32 to = (i + turn) % 16;
        if (to >= cluster || !(mask >> to & 1)) continue;
        if (mode(MODE_SLOW)) delay();
        count(COUNT_ARRIVALS);
        if (to == rank()) {
            asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier)
                         : "memory");
            continue;
        }
        u32 there;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(barrier), "r"(to));
        asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(there)
                     : "memory");
    }
}

static __device__ Step queued_step(u32 slot, u32 index) {
    const volatile Step* s = &tc_queue[slot * QUEUE + index];
    return {s->a, s->b, s->d, s->instruction, s->flags, s->mask};
}
// One thread. There is room.
static __device__ void push(u32 slot, const Step& s) {
    const u32 end = current(&tc_queued[slot]);
    volatile Step* to = &tc_queue[slot * QUEUE + end];
    to->a = s.a, to->b = s.b, to->d = s.d, to->instruction = s.instruction, to->flags = s.flags,
    to->mask = s.mask;
    *(volatile u32*)&tc_queued[slot] = end + 1;
    atomicMax(&tc_counts[COUNT_MOST_QUEUED], (u64)(end + 1 - current(&tc_first[slot])));
    __threadfence();
}
static __device__ bool empty(u32 slot) {
    return current(&tc_first[slot]) == current(&tc_queued[slot]);
}
// Whether the queue's next step was issued by the whole warp. One that a thread has issued alone is
// left to that thread's commit.
static __device__ bool waits_for_warp(u32 slot) {
    return !empty(slot) && queued_step(slot, current(&tc_first[slot])).flags & WARP;
}

// Executes the steps in the warp's queue: those up to the first commit and that commit, or all steps
// if any thread passes `all`. Called by all threads of the warp.
//
// The MMAs before a commit run in another order than they were issued in, those of the last
// accumulator first: hardware keeps the order only of MMAs with the same accumulator and shape.
static __device__ __noinline__ void drain(u32 slot, bool all) {
    all = __any_sync(ALL, all);
    u32 first = current(&tc_first[slot]);
    const u32 end = current(&tc_queued[slot]);
    while (first < end) {
        Step own{};
        const u32 present = min(32u, end - first);
        if (lane() < present) own = queued_step(slot, first + lane());
        __syncwarp();
        const u32 commits = __ballot_sync(ALL, own.flags & COMMIT);
        const u32 steps = commits ? __ffs(commits) - 1 : present;
        u32 left = (u32)((1ull << steps) - 1);
        while (left) {
            const u32 last = 31 - __clz(left);
            const u32 d = __shfl_sync(ALL, own.d, last),
                      instruction = __shfl_sync(ALL, own.instruction, last);
            const u32 same =
                left & __ballot_sync(ALL, own.d == d && own.instruction == instruction);
            multiply(own.a, own.b, own.flags, same, d, instruction);
            left &= ~same;
        }
        first += steps;
        if (commits) {
            if (lane() == steps) arrive(own.d, own.mask);
            ++first;
            if (!all) break;
        }
        __syncwarp();
    }
    __syncwarp();
    if (lane() == 0) {
        const bool done = first == end;
        *(volatile u32*)&tc_first[slot] = done ? 0 : first;
        if (done) *(volatile u32*)&tc_queued[slot] = 0;
        __threadfence();
    }
    __syncwarp();
}
// One thread: executes what it has issued alone.
static __device__ void drain_alone(u32 slot) {
    const u32 end = current(&tc_queued[slot]);
    for (u32 i = current(&tc_first[slot]); i < end; ++i) {
        const Step s = queued_step(slot, i);
        if (s.flags & (WARP | COMMIT))
            fail(ERROR_DIVERGED, s.flags);
        else
            multiply_alone(s);
    }
    *(volatile u32*)&tc_first[slot] = 0;
    *(volatile u32*)&tc_queued[slot] = 0;
}
static __device__ void whole_warp() {
    const u32 together = __activemask();
    if (!gathered(INSTRUCTION, together, limit())) fail(ERROR_DIVERGED, together);
    __syncwarp();
}

extern "C" __device__ __noinline__ void tc_mma(u32 d, u64 a, u64 b, u32 instruction, u32 flags) {
    const u32 slot = warp_slot();
    Step s{a, b, d, instruction, flags, 0};
    if (!(flags & WARP)) {
        count(COUNT_MMAS);
        if (!well_formed(s)) return;
        if (!mode(MODE_LATE_MMA)) return multiply_alone(s);
        if (current(&tc_queued[slot]) == QUEUE) drain_alone(slot);
        return push(slot, s);
    }
    whole_warp();
    const u32 leader = __ffs(__ballot_sync(ALL, flags & LEADER)) - 1;
    s.d = __shfl_sync(ALL, d, leader), s.instruction = __shfl_sync(ALL, instruction, leader);
    s.a = __shfl_sync(ALL, a, leader), s.b = __shfl_sync(ALL, b, leader);
    s.flags = __shfl_sync(ALL, flags, leader);
    bool good = true;
    if (lane() == leader) count(COUNT_MMAS), good = well_formed(s);
    if (!__all_sync(ALL, good)) return;
    if (!mode(MODE_LATE_MMA)) return multiply(s.a, s.b, s.flags, 1, s.d, s.instruction);
    if (current(&tc_queued[slot]) == QUEUE) drain(slot, true);
    __syncwarp();
    if (lane() == leader) push(slot, s);
    __syncwarp();
}

// An arrival at the barrier, or at that of each CTA of the mask, when all MMAs so far are complete.
extern "C" __device__ __noinline__ void tc_commit(u32 barrier, u32 mask, u32 flags) {
    const u32 slot = warp_slot();
    if (!(flags & WARP)) {
        count(COUNT_COMMITS);
        drain_alone(slot);
        return arrive(barrier, mask);
    }
    whole_warp();
    const bool leads = flags & LEADER;
    if (leads) count(COUNT_COMMITS);
    if (mode(MODE_DEEP_MMA)) {
        if (current(&tc_queued[slot]) == QUEUE) drain(slot, true);
        __syncwarp();
        if (leads) push(slot, Step{0, 0, barrier, 0, COMMIT | WARP, mask});
    } else {
        if (!empty(slot)) drain(slot, true);
        __syncwarp();
        if (leads) arrive(barrier, mask);
    }
    __syncwarp();
}
