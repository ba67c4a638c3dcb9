// One MMA or several: descriptors, operands, and the products on mma.sync or in one thread.
#pragma once

#include "exact.cuh"
#include "machine.cuh"
#include "tensor_memory.cuh"

// The shared address of an element, by a descriptor of a K-major or an MN-major operand.
static __device__ u32 element(u64 descriptor, u32 row, u32 k, bool mn_major) {
    const u32 leading = (u32)(descriptor >> 16 & 0x3fff) << 4,
              stride = (u32)(descriptor >> 32 & 0x3fff) << 4;
    const u32 swizzle = (u32)(descriptor >> 61);
    const u32 width = swizzle == 2 ? 128 : swizzle == 4 ? 64 : swizzle == 6 ? 32 : 16;
    u32 at = (u32)(descriptor & 0x3fff) << 4;
    if (!mn_major) {
        at += (row >> 3) * stride + (row & 7) * width;
        at += width == 16 ? (k >> 3) * leading + (k & 7) * 2 : k * 2;
    } else {
        const u32 per = width / 2, outer = row / per, inner = row % per;
        at += inner * 2 + (k & 7) * width;
        at +=
            width == 16 ? outer * stride + (k >> 3) * leading : outer * leading + (k >> 3) * stride;
    }
    at ^= (at >> 7 & (width / 16 - 1)) << 4;
    if (at < RESERVED || at + 4 > shared_end()) fail(ERROR_SHARED, at, row, k), at = RESERVED;
    // A descriptor has an offset in the CTA's own shared memory. An address has the CTA's rank in
    // its upper 8 bits: in a cluster, one without it is not that of the CTA.
    return at | rank() << 24;
}
static __device__ u32 half_at(u64 descriptor, u32 row, u32 k, bool mn_major) {
    unsigned short value;
    asm volatile("ld.shared.u16 %0, [%1];"
                 : "=h"(value)
                 : "r"(element(descriptor, row, k, mn_major))
                 : "memory");
    return value;
}
static __device__ __noinline__ u32 strided_pair_at(u64 descriptor, u32 row, u32 k) {
    return half_at(descriptor, row, k, true) | half_at(descriptor, row, k + 1, true) << 16;
}
// Elements k and k + 1, k even.
static __device__ u32 pair_at(u64 descriptor, u32 row, u32 k, bool mn_major) {
    if (mn_major) return strided_pair_at(descriptor, row, k);
    u32 value;
    asm volatile("ld.shared.b32 %0, [%1];"
                 : "=r"(value)
                 : "r"(element(descriptor, row, k, false))
                 : "memory");
    return value;
}
struct Shape {
    u32 m, n;
    bool bf16, a_mn, b_mn;
};
static __device__ Shape shape(u32 instruction) {
    return {(instruction >> 24 & 31) * 16, (instruction >> 17 & 63) * 8,
            (instruction >> 7 & 7) == 1, (instruction >> 15 & 1) != 0,
            (instruction >> 16 & 1) != 0};
}

// Whether an MMA can be executed; counts what is wrong with it. D is FP32; A and B are both FP16 or
// both BF16, neither negated nor sparse.
static __device__ bool well_formed(const Step& s) {
    const u32 i = s.instruction, a_type = i >> 7 & 7, b_type = i >> 10 & 7;
    const Shape of = shape(i);
    bool good = (i >> 4 & 3) == 1 && a_type < 2 && a_type == b_type && !(i & 0xe080604fu);
    good = good && (of.m == 128 ? of.n % 16 == 0 && of.n >= 16 && of.n <= 256
                                : of.m == 64 && of.n % 8 == 0 && of.n >= 8 && of.n <= 256);
    if (!good || s.flags & MASKED) return fail(ERROR_INSTRUCTION, i, s.flags), false;
    for (const u64 d : {s.a, s.b}) {
        // Version 1; no base offset, no fixed bits; a swizzle that is modelled; reserved bits are
        // zero.
        if ((d >> 46 & 7) != 1 || (d >> 49 & 0xfff) || d >> 61 & 1 || d >> 14 & 3 || d >> 30 & 3) {
            return fail(ERROR_DESCRIPTOR, (u32)(d >> 32), (u32)d), false;
        }
    }
    if (s.d >> 16 || !owned(s.d & 0xffff, of.n)) return fail(ERROR_UNALLOCATED, s.d, of.n), false;
    return true;
}

static __device__ float* sum_at(u32 d, u32 row, u32 column, u32 m) {
    const u32 lane = m == 128 ? row : row / 16 * 32 + row % 16;
    return (float*)&tc_memory[(multiprocessor() * LANES + lane) * COLUMNS + (d & 0xffff) + column];
}

// One k16 step for 16 rows and 8 columns.
static __device__ void mma_sync(float2& up, float2& down, const u32 (&a)[4], u32 b0, u32 b1,
                                bool bf16) {
#define MMA(type)                                                                  \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type            \
                 ".f32 "                                                           \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(up.x), "+f"(up.y), "+f"(down.x), "+f"(down.y)              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if (bf16)
        MMA("bf16");
    else
        MMA("f16");
#undef MMA
}

// Executes one step for each lane in `chosen`, in the order of the lanes. Each thread of the warp
// calls with operands and flags of its own; all steps have accumulator `d` and one instruction.
static __device__ __noinline__ void multiply(u64 own_a, u64 own_b, u32 own_flags, u32 chosen, u32 d,
                                             u32 instruction) {
    constexpr u32 TILES = 8;
    const Shape of = shape(instruction);
    const u32 group = lane() / 4, pair = lane() % 4 * 2;
    if (lane() == 0) {
        if (!owned(d & 0xffff, of.n)) fail(ERROR_UNALLOCATED, d, of.n);
        if (mode(MODE_SLOW)) delay();
    }
    __syncwarp();
    for (u32 first = 0; first < of.n; first += 8 * TILES) {
        for (u32 row = 0; row < of.m; row += 16) {
            float2 up[TILES] = {}, down[TILES] = {};
            float2* top = (float2*)sum_at(d, row + group, first + pair, of.m);
            float2* bottom = (float2*)sum_at(d, row + group + 8, first + pair, of.m);
            if (__shfl_sync(ALL, own_flags, __ffs(chosen) - 1) & ACCUMULATE) {
#pragma unroll
                for (u32 j = 0; j < TILES; ++j) {
                    if (first + 8 * j < of.n)
                        up[j] = __ldcg(top + 4 * j), down[j] = __ldcg(bottom + 4 * j);
                }
            }
            for (u32 left = chosen; left; left &= left - 1) {
                const u32 source = __ffs(left) - 1;
                const u64 a = __shfl_sync(ALL, own_a, source), b = __shfl_sync(ALL, own_b, source);
                if (!(__shfl_sync(ALL, own_flags, source) & ACCUMULATE)) {
#pragma unroll
                    for (u32 j = 0; j < TILES; ++j) up[j] = down[j] = float2{0, 0};
                }
                const u32 rows[4] = {pair_at(a, row + group, pair, of.a_mn),
                                     pair_at(a, row + group + 8, pair, of.a_mn),
                                     pair_at(a, row + group, pair + 8, of.a_mn),
                                     pair_at(a, row + group + 8, pair + 8, of.a_mn)};
#pragma unroll
                for (u32 j = 0; j < TILES; ++j) {
                    const u32 column = first + 8 * j + group;
                    if (first + 8 * j < of.n) {
                        mma_sync(up[j], down[j], rows, pair_at(b, column, pair, of.b_mn),
                                 pair_at(b, column, pair + 8, of.b_mn), of.bf16);
                    }
                }
            }
#pragma unroll
            for (u32 j = 0; j < TILES; ++j) {
                if (first + 8 * j < of.n)
                    __stcg(top + 4 * j, up[j]), __stcg(bottom + 4 * j, down[j]);
            }
        }
    }
    __threadfence();
    __syncwarp();
}

// The same for one step and one thread.
static __device__ __noinline__ void multiply_alone(const Step& s) {
    const Shape of = shape(s.instruction);
    if (mode(MODE_SLOW)) delay();
    for (u32 row = 0; row < of.m; ++row) {
        for (u32 column = 0; column < of.n; ++column) {
            float* at = sum_at(s.d, row, column, of.m);
            u32 a[STEP], b[STEP];
            for (u32 k = 0; k < STEP; ++k) {
                a[k] = half_at(s.a, row, k, of.a_mn), b[k] = half_at(s.b, column, k, of.b_mn);
            }
            __stcg(at, exact_sum(s.flags & ACCUMULATE ? __ldcg(at) : 0, a, b, of.bf16));
        }
    }
    __threadfence();
}
