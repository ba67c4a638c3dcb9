// topk_select: the top_k largest scores of every row, and where they stand.
//
//   values, ids = the top_k largest of scores[row, 0 : row_length], in rank order
//
// NaN ranks as -inf; +0 and -0 rank alike; of scores that rank alike, the lower id comes first. A
// value is returned with the very bits that it has in the row, a NaN's included. The ids are
// distinct and in [0, row_length).
// Preconditions: 1 <= top_k <= 32, row_stride >= row_length,
// top_k <= row_length <= VALUES_PER_LANE * 32 * WARPS_PER_ROW * BLOCKS_PER_ROW.
//
// A row is cut into one contiguous part for each of its warps. A warp reads its part once, into
// registers, and selects the best top_k of it. Where several warps share a row, one warp then
// selects from the lists of its block; where a cluster of blocks shares a row, a warp of the first
// block selects from the lists of the blocks. Lists stand in the order of their parts and each list
// is in rank order, so that among equal keys position in the lists and position in the row agree.

#include "common/ptx.cuh"
#include "common/selection.cuh"

constexpr unsigned WARPS = THREADS / WARP;
constexpr unsigned ROWS_PER_BLOCK = WARPS / WARPS_PER_ROW;
constexpr unsigned PARTS = WARPS_PER_ROW * BLOCKS_PER_ROW;
constexpr unsigned LISTED = 8 * WARP;  // candidates that one selection from lists can take
constexpr unsigned STEP = 4 * WARP;    // scores that a warp reads with one 16-byte load a lane
static_assert(PARTS == 1 || ROWS_PER_BLOCK == 1, "a block that shares a row has no other");
static_assert(WARPS_PER_ROW <= 8 && BLOCKS_PER_ROW <= 8, "top_k <= 32 from each must fit LISTED");

__device__ __forceinline__ void load_keys(const float* row, unsigned lane, unsigned begin,
                                          unsigned end, unsigned row_length,
                                          unsigned (&keys)[VALUES_PER_LANE]) {
    if (row_length % 4 == 0 && is_aligned(row, 16)) {  // begin is a multiple of 4, and so is end
        float4 loaded[VALUES_PER_LANE / 4];
#pragma unroll
        for (unsigned group = 0; group < VALUES_PER_LANE / 4; ++group) {
            const unsigned id = begin + first_index(lane, group);
            loaded[group] = {};
            if (id < end) loaded[group] = *reinterpret_cast<const float4*>(row + id);
        }
#pragma unroll
        for (unsigned group = 0; group < VALUES_PER_LANE / 4; ++group) {
            const bool inside = begin + first_index(lane, group) < end;
            keys[4 * group] = inside ? ordered(loaded[group].x) : 0;
            keys[4 * group + 1] = inside ? ordered(loaded[group].y) : 0;
            keys[4 * group + 2] = inside ? ordered(loaded[group].z) : 0;
            keys[4 * group + 3] = inside ? ordered(loaded[group].w) : 0;
        }
    } else {
#pragma unroll
        for (unsigned v = 0; v < VALUES_PER_LANE; ++v) {
            const unsigned id = begin + first_index(lane, v / 4) + v % 4;
            keys[v] = id < end ? ordered(row[id]) : 0;
        }
    }
}

// The best k of a list, as warp_top_k. Absent candidates of the list are 0.
__device__ __forceinline__ Packed best_of_list(const Packed* list, unsigned size, unsigned lane,
                                               unsigned k, SelectionScratch& scratch) {
    unsigned keys[LISTED / WARP];
#pragma unroll
    for (unsigned v = 0; v < LISTED / WARP; ++v) {
        const unsigned position = first_index(lane, v / 4) + v % 4;
        keys[v] = position < size ? static_cast<unsigned>(list[position] >> 32) : 0;
    }
    const Packed best = warp_top_k(keys, lane, k, scratch);
    return best != 0 ? list[index_of(best)] : 0;
}

// No pointer is __restrict__: that would let the compiler read through the non-coherent cache,
// which may not be used for what the previous grid was still writing when this one started.
extern "C" __global__ void __launch_bounds__(THREADS)
topk_select(const float* scores, float* values_out, int* ids_out, int rows, int row_length,
            long long row_stride, int top_k) {
    __shared__ SelectionScratch scratch[WARPS];
    const unsigned warp = threadIdx.x / WARP;
    const unsigned lane = threadIdx.x % WARP;

    allow_next_grid();
    // Blocks of a cluster may reach each other's shared memory once all of them have started.
    if constexpr (BLOCKS_PER_ROW > 1) cluster_arrive();
    wait_for_previous_grids();

    const long long row =
        static_cast<long long>(blockIdx.x / BLOCKS_PER_ROW) * ROWS_PER_BLOCK + warp / WARPS_PER_ROW;
    if constexpr (PARTS == 1) {
        if (row >= rows) return;  // whole warps, which share nothing
    }

    const unsigned block = blockIdx.x % BLOCKS_PER_ROW;
    const unsigned part = block * WARPS_PER_ROW + warp % WARPS_PER_ROW;
    const unsigned length = static_cast<unsigned>(row_length);
    const unsigned part_length = (length + PARTS * STEP - 1) / (PARTS * STEP) * STEP;
    const unsigned begin = part * part_length;
    const unsigned end = min(begin + part_length, length);
    const float* row_scores = scores + row * row_stride;
    const unsigned k = static_cast<unsigned>(top_k);

    unsigned keys[VALUES_PER_LANE];
    load_keys(row_scores, lane, begin, end, length, keys);
    Packed best = warp_top_k(keys, lane, k, scratch[warp]);
    if (best != 0) best -= begin;  // the inverted index: ~(index + begin) = ~index - begin

    if constexpr (WARPS_PER_ROW > 1) {
        __shared__ Packed warp_lists[LISTED];
        if (lane < k) warp_lists[warp * k + lane] = best;
        __syncthreads();
        if (warp == 0) best = best_of_list(warp_lists, WARPS_PER_ROW * k, lane, k, scratch[0]);
    }
    if constexpr (BLOCKS_PER_ROW > 1) {
        __shared__ Packed block_lists[LISTED];
        cluster_wait();
        if (warp == 0 && lane < k) store_to_block(&block_lists[block * k + lane], 0, best);
        __syncwarp();
        cluster_arrive();
        cluster_wait();
        if (block != 0) return;
        if (warp == 0) best = best_of_list(block_lists, BLOCKS_PER_ROW * k, lane, k, scratch[0]);
    }

    if (warp % WARPS_PER_ROW == 0 && lane < k) {
        const unsigned id = index_of(best);
        // As integers, so that no NaN loses its bits.
        reinterpret_cast<unsigned*>(values_out)[row * top_k + lane] =
            reinterpret_cast<const unsigned*>(row_scores)[id];
        ids_out[row * top_k + lane] = static_cast<int>(id);
    }
}
