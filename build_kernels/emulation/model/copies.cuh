// Copies from global memory: begun where they are issued, or left to a thread that waits for them.
#pragma once

#include "machine.cuh"

static __device__ void begin(const Copy& c) {
    const unsigned short mask = (unsigned short)c.mask;
    if (c.kind == BULK) {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
            "[%3];" ::"r"(c.target),
            "l"(c.source), "r"(c.size), "r"(c.barrier)
            : "memory");
    } else if (c.kind == BULK_MULTICAST) {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%0], [%1], %2, [%3], %4;" ::"r"(c.target),
            "l"(c.source), "r"(c.size), "r"(c.barrier), "h"(mask)
            : "memory");
    } else if (c.kind == TILE) {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
            "[%0], [%1, {%2, %3}], [%4];" ::"r"(c.target),
            "l"(c.source), "r"(c.x), "r"(c.y), "r"(c.barrier)
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(c.target),
            "l"(c.source), "r"(c.x), "r"(c.y), "r"(c.barrier), "h"(mask)
            : "memory");
    }
}

// Begins a copy now, or leaves it to a thread of the CTA that waits for its barrier.
static __device__ void request(const Copy& c) {
    if (mode(MODE_SLOW)) delay();
    if (!mode(MODE_LATE_COPY)) return begin(c);
    const u32 sm = multiprocessor();
    for (u32 i = 0; i < COPIES; ++i) {
        Copy* at = &tc_copies[sm * COPIES + i];
        if (current(&at->state) != FREE || atomicCAS(&at->state, FREE, BUSY) != FREE) continue;
        volatile Copy* to = at;
        to->source = c.source, to->cta = identity(), to->kind = c.kind, to->target = c.target;
        to->barrier = c.barrier, to->size = c.size, to->x = c.x, to->y = c.y, to->mask = c.mask;
        __threadfence();
        atomicExch(&at->state, READY);
        atomicAdd(&tc_pending[sm], 1u);
        count(COUNT_LATE_COPIES);
        return;
    }
    begin(c);
}

// The threads of `together`: begin the CTA's copies that this barrier waits for, or all.
static __device__ bool begin_copies(u32 together, u32 barrier, bool all) {
    const u32 sm = multiprocessor();
    const u32 threads = __popc(together), own = __popc(together & ((1u << lane()) - 1));
    bool begun = false;
    if (current(&tc_pending[sm])) {
        for (u32 i = own; i < COPIES; i += threads) {
            Copy* at = &tc_copies[sm * COPIES + i];
            if (current(&at->state) != READY) continue;
            __threadfence();
            const volatile Copy* c = at;
            if (c->cta != identity() || !(all || (c->barrier ^ barrier) << 8 == 0)) continue;
            if (atomicCAS(&at->state, READY, BUSY) != READY) continue;
            begin(Copy{c->source, c->cta, 0, c->kind, c->target, c->barrier, c->size, c->x, c->y,
                       c->mask});
            atomicExch(&at->state, FREE);
            atomicSub(&tc_pending[sm], 1u);
            begun = true;
        }
    }
    return __any_sync(together, begun);
}

extern "C" __device__ __noinline__ void tc_copy_bulk(u32 target, u64 source, u32 size, u32 barrier,
                                                     u32 mask) {
    request(Copy{source, 0, 0, mask == OWN_BARRIER ? BULK : BULK_MULTICAST, target, barrier, size,
                 0, 0, mask});
}
extern "C" __device__ __noinline__ void tc_copy_tile(u32 target, u64 map, u32 x, u32 y, u32 barrier,
                                                     u32 mask) {
    request(Copy{map, 0, 0, mask == OWN_BARRIER ? TILE : TILE_MULTICAST, target, barrier, 0, x, y,
                 mask});
}
// Before any other asynchronous copy.
extern "C" __device__ __noinline__ void tc_delay() {
    if (mode(MODE_SLOW)) delay();
}
