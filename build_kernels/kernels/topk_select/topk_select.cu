// topk_select: the top_k largest scores of every row of [rows, row_length], and their columns.
//
//   values, ids = the top_k largest of scores[row, 0 : row_length], in rank order
//
// The order is that of steps 4 and 5 of router_runtime/spec.py: a NaN ranks as -inf, +0 and -0 rank
// alike, and of scores that rank alike the lower id comes first. A value is returned with the bits
// that it has in the row, a NaN's included. The ids are distinct and in [0, row_length).
//
// Steps, for one row that is cut into WARPS_PER_ROW * BLOCKS_PER_ROW contiguous parts:
//
//   1. Each warp loads its part once, as ordered keys in registers, and selects the part's top_k.
//   2. If several warps of a CTA share the row: each writes its list of top_k candidates to shared
//      memory, __syncthreads, and warp 0 selects from the lists.
//   3. If the CTAs of a cluster share the row: warp 0 of each stores its list to the shared memory
//      of the CTA of rank 0; after a cluster barrier, warp 0 of that CTA selects from the lists.
//   4. Lane j of the last warp that selected stores the value and id of rank j.
//
// The lists lie in the order of their parts, and each is in rank order. So of two equal keys, the
// one at the lower position in the lists has the lower column, and the tie rule holds throughout.
//
// Grid: rows times BLOCKS_PER_ROW CTAs, or CTAs of THREADS / 32 rows where a warp has a row of its
// own. A lane holds VALUES_PER_LANE keys (layout: common/selection.cuh), then one candidate.
// Cluster barrier: phase 1 (arrive before the dependency wait, wait before the first remote store)
// makes sure that all CTAs of the cluster have started; phase 2 orders the remote stores before
// their loads.
// Dependent launch (common/ptx.cuh): before the wait there is only the arrival of phase 1.
//
// Constants (build_kernels/catalog): VALUES_PER_LANE, WARPS_PER_ROW, BLOCKS_PER_ROW, THREADS.
// Preconditions: 1 <= top_k <= 32, row_stride >= row_length (in elements),
// top_k <= row_length <= VALUES_PER_LANE * 32 * WARPS_PER_ROW * BLOCKS_PER_ROW.

#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/selection.cuh"

constexpr unsigned WARPS = THREADS / WARP;
constexpr unsigned ROWS_PER_BLOCK = WARPS / WARPS_PER_ROW;
constexpr unsigned PARTS = WARPS_PER_ROW * BLOCKS_PER_ROW;  // of a row
constexpr unsigned LISTED = 8 * WARP;  // most candidates that one selection from lists takes
constexpr unsigned STEP = 4 * WARP;    // scores that a warp loads with one 16-byte load per lane
static_assert(PARTS == 1 || ROWS_PER_BLOCK == 1, "a CTA that shares a row has no other");
static_assert(WARPS_PER_ROW <= 8 && BLOCKS_PER_ROW <= 8, "8 lists of top_k <= 32 fill LISTED");

// Loads this lane's ordered keys of the columns [begin, end) of a row: the key of index i is that
// of column begin + i, or 0 from `end` on. Called by every lane of a warp; no exchange. `begin` is
// a multiple of STEP; `end` is one too, or row_length, and at most `begin` for an empty part.
__device__ __forceinline__ void load_keys(const float* row, unsigned lane, unsigned begin,
                                          unsigned end, unsigned row_length,
                                          unsigned (&keys)[VALUES_PER_LANE]) {
    if (row_length % 4 == 0 && is_aligned(row, 16)) {  // so no group of 4 columns straddles `end`
        float4 loaded[VALUES_PER_LANE / 4];
#pragma unroll
        for (unsigned group = 0; group < VALUES_PER_LANE / 4; ++group) {
            const unsigned column = begin + group_index(lane, group);
            loaded[group] = {};
            if (column < end) loaded[group] = *reinterpret_cast<const float4*>(row + column);
        }
#pragma unroll
        for (unsigned group = 0; group < VALUES_PER_LANE / 4; ++group) {
            const bool inside = begin + group_index(lane, group) < end;
            keys[4 * group] = inside ? ordered_key(loaded[group].x) : 0;
            keys[4 * group + 1] = inside ? ordered_key(loaded[group].y) : 0;
            keys[4 * group + 2] = inside ? ordered_key(loaded[group].z) : 0;
            keys[4 * group + 3] = inside ? ordered_key(loaded[group].w) : 0;
        }
    } else {
#pragma unroll
        for (unsigned v = 0; v < VALUES_PER_LANE; ++v) {
            const unsigned column = begin + value_index(lane, v);
            keys[v] = column < end ? ordered_key(row[column]) : 0;
        }
    }
}

// Returns to lane j the candidate of rank j among the `size` <= LISTED candidates of a list in
// shared memory, 0 from rank k on, as warp_top_k does. A candidate of 0 is none. The full warp
// calls it, after a barrier that orders the list's stores.
__device__ __forceinline__ Candidate top_k_of_list(const Candidate* list, unsigned size,
                                                   unsigned lane, unsigned k,
                                                   SelectionScratch& scratch) {
    unsigned keys[LISTED / WARP];
#pragma unroll
    for (unsigned v = 0; v < LISTED / WARP; ++v) {
        const unsigned position = value_index(lane, v);
        keys[v] = position < size ? candidate_key(list[position]) : 0;
    }
    const Candidate best = warp_top_k(keys, lane, k, scratch);  // its index: a list position
    return best != 0 ? list[candidate_index(best)] : 0;
}

extern "C" __global__ void __launch_bounds__(THREADS)
topk_select(const float* scores, float* values_out, int* ids_out, int rows, int row_length,
            long long row_stride, int top_k) {
    __shared__ SelectionScratch scratch[WARPS];
    const unsigned warp = threadIdx.x / WARP;
    const unsigned lane = threadIdx.x % WARP;

    griddepcontrol_launch_dependents();
    if constexpr (BLOCKS_PER_ROW > 1) cluster_arrive();  // phase 1
    griddepcontrol_wait();

    const long long row =
        static_cast<long long>(blockIdx.x / BLOCKS_PER_ROW) * ROWS_PER_BLOCK + warp / WARPS_PER_ROW;
    if constexpr (PARTS == 1) {
        if (row >= rows) return;  // whole warps; no barrier of the CTA follows
    }

    // 1. The best k of this warp's part.
    const unsigned cta_rank = blockIdx.x % BLOCKS_PER_ROW;  // in the cluster
    const unsigned part = cta_rank * WARPS_PER_ROW + warp % WARPS_PER_ROW;
    const unsigned length = static_cast<unsigned>(row_length);
    const unsigned part_length = (length + PARTS * STEP - 1) / (PARTS * STEP) * STEP;
    const unsigned begin = part * part_length;
    const unsigned end = min(begin + part_length, length);
    const float* row_scores = scores + row * row_stride;
    const unsigned k = static_cast<unsigned>(top_k);
    unsigned keys[VALUES_PER_LANE];
    load_keys(row_scores, lane, begin, end, length, keys);
    Candidate best = warp_top_k(keys, lane, k, scratch[warp]);
    // From an index in the part to a column. It is stored inverted: ~(index + begin) = ~index -
    // begin.
    if (best != 0) best -= begin;

    // 2. The best k of the CTA, to warp 0.
    if constexpr (WARPS_PER_ROW > 1) {
        __shared__ Candidate warp_lists[LISTED];
        if (lane < k) warp_lists[warp * k + lane] = best;
        __syncthreads();
        if (warp == 0) best = top_k_of_list(warp_lists, WARPS_PER_ROW * k, lane, k, scratch[0]);
    }

    // 3. The best k of the cluster, to warp 0 of the CTA of rank 0.
    if constexpr (BLOCKS_PER_ROW > 1) {
        __shared__ Candidate cta_lists[LISTED];
        cluster_wait();  // phase 1
        if (warp == 0 && lane < k) store_to_cluster_rank(&cta_lists[cta_rank * k + lane], 0, best);
        __syncwarp();      // the cluster barrier needs converged warps
        cluster_arrive();  // phase 2
        cluster_wait();
        if (cta_rank != 0) return;  // no CTA reads another's shared memory from here on
        if (warp == 0) best = top_k_of_list(cta_lists, BLOCKS_PER_ROW * k, lane, k, scratch[0]);
    }

    // 4. The results.
    if (warp % WARPS_PER_ROW == 0 && lane < k) {
        const unsigned id = candidate_index(best);
        // Copied as integers, so that a NaN keeps its bits.
        reinterpret_cast<unsigned*>(values_out)[row * top_k + lane] =
            reinterpret_cast<const unsigned*>(row_scores)[id];
        ids_out[row * top_k + lane] = static_cast<int>(id);
    }
}
