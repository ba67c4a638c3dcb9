// Tensor memory: allocation, and where a warp's registers lie. All threads of a warp call.
#pragma once

#include "machine.cuh"

// The units that hold some columns, as bits; none if there are no such columns.
static __device__ u32 units(u32 first, u32 columns) {
    const u32 end = first + columns;
    if (!columns || first >= COLUMNS || columns > COLUMNS || end > COLUMNS) return 0;
    return (u32)((1ull << (end + UNIT - 1) / UNIT) - (1ull << first / UNIT));
}
static __device__ __noinline__ bool owned(u32 first, u32 columns) {
    const u32 need = units(first, columns), sm = multiprocessor();
    if (!need || (current(&tc_taken[sm]) & need) != need) return false;
    for (u32 left = need; left; left &= left - 1) {
        if (((volatile u64*)tc_owner)[sm * (COLUMNS / UNIT) + __ffs(left) - 1] != identity())
            return false;
    }
    return true;
}

extern "C" __device__ __noinline__ void tc_alloc(u32 target, u32 columns) {
    __syncwarp();
    const u32 sm = multiprocessor();
    u32 base = 0;
    if (columns < UNIT || columns > COLUMNS || columns & (columns - 1)) {
        if (lane() == 0) fail(ERROR_ALLOCATION, columns);
        columns = columns < UNIT ? UNIT : COLUMNS;
    }
    if (lane() == 0) {
        count(COUNT_ALLOCATIONS);
        const u32 n = columns / UNIT, last = COLUMNS / UNIT - n, bits = (1u << n) - 1;
        Watch watch;
        for (bool done = false; !done && !watch.over(0, 0);) {
            const u32 before = current(&tc_taken[sm]);
            for (u32 i = 0; i <= last && !done; ++i) {
                const u32 unit = mode(MODE_HIGH_COLUMNS) ? last - i : i;
                if (before & bits << unit) continue;
                if (atomicCAS(&tc_taken[sm], before, before | bits << unit) != before) break;
                base = unit * UNIT, done = true;
                for (u32 j = 0; j < n; ++j) {
                    ((volatile u64*)tc_owner)[sm * (COLUMNS / UNIT) + unit + j] = identity();
                }
            }
            if (!done) __nanosleep(100);
        }
    }
    base = __shfl_sync(ALL, base, 0);
    for (u32 i = lane(); i < LANES * columns; i += 32) {
        ((volatile u32*)tc_memory)[(sm * LANES + i / columns) * COLUMNS + base + i % columns] =
            NAN_BITS;
    }
    __threadfence();
    __syncwarp();
    if (lane() == 0) asm volatile("st.shared.b32 [%0], %1;" ::"r"(target), "r"(base) : "memory");
    __syncwarp();
}

extern "C" __device__ __noinline__ void tc_dealloc(u32 base, u32 columns) {
    __syncwarp();
    if (lane() == 0) {
        count(COUNT_DEALLOCATIONS);
        const u32 slot = warp_slot();
        if (current(&tc_queued[slot]) != current(&tc_first[slot]))
            fail(ERROR_QUEUED, base, columns);
        if (base % UNIT || columns % UNIT || !owned(base, columns)) {
            fail(ERROR_ALLOCATION, base, columns);
        } else {
            atomicAnd(&tc_taken[multiprocessor()], ~units(base, columns));
        }
    }
    __syncwarp();
}

// The address of a thread's first register. `form` 0: 16x256b, 1: 32x32b, 2: 16x128b, 3: 16x32bx2; 8
// more: a store; 16 times the columns between the two parts of 16x32bx2. `columns`: of the whole
// instruction, or of a part.
extern "C" __device__ __noinline__ u64 tc_row(u32 address, u32 form, u32 columns) {
    const u32 first = address >> 16, own = thread() / 32 % 4 * 32;
    const bool wide = (form & 7) == 1, parts = (form & 7) == 3;
    const u32 between = form >> 4;
    u32 column = address & 0xffff;
    if (mode(MODE_SLOW) && lane() == 0) long_delay();
    __syncwarp();
    if (lane() == 0) {
        count(form & 8 ? COUNT_STORES : COUNT_LOADS);
        if (first != own && (wide || first != own + 16)) fail(ERROR_LANE, first, own);
        if (!owned(column, columns) || !owned(column + between, columns))
            fail(ERROR_UNALLOCATED, address, columns, between);
    }
    const u32 row = own + (wide ? lane() : (first & 16) + (parts ? lane() % 16 : lane() / 4));
    if (parts)
        column += lane() / 16 * between;
    else if (!wide)
        column += lane() % 4 * ((form & 7) == 0 ? 2 : 1);
    return (u64)&tc_memory[(multiprocessor() * LANES + row) * COLUMNS + column % COLUMNS];
}
