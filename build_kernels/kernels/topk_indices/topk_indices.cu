// topk_indices: the positions of the top_k largest scores of every row, exactly.
//
//   positions = the top_k largest of scores[row, row_starts[row] : row_ends[row]], counted from
//   row_starts[row]; in ascending order, or in rank order
//
// The order of scores is that of steps 4 and 5 of router_runtime/spec.py: a NaN ranks as -inf (or,
// with nan_first, above +inf), +0 and -0 rank alike, and of scores that rank alike the lower
// position comes first. A row with fewer than top_k scores is filled up with -1. Scores outside of
// the row's bounds are never read.
//
// A score and its position form a candidate (common/selection.cuh): one number, and the order of
// these numbers is the order of the scores. No two are equal.
//
// Two forms: held.cuh keeps the scores of short rows, and of a few long ones, in registers;
// streamed.cuh, and the files that it includes, serves rows of any length. The CTAs of a cluster share one row.
//
// The result depends on nothing but the row: a sample only decides how many steps and how much memory
// the selection takes, and the order in which threads append to a list only where in it something is.
//
// Cluster barriers: each is executed by all threads of the cluster, because every condition around
// one follows from numbers that all CTAs have exchanged. The last one keeps every CTA alive until
// the others have read its shared memory.
// Dependent launch (common/ptx.cuh): only shared memory is prepared before the wait.
//
// Constants (build_kernels/catalog): SCORE_BYTES (4: fp32, 2: bf16), BLOCKS_PER_ROW, BLOCKS_PER_SM,
// THREADS, MAX_TOP_K, HELD (0: the streamed form), and those of the form.
// Preconditions: 1 <= top_k <= MAX_TOP_K, columns < 2^31, page_size >= 1 if there is a page_table.

#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/selection.cuh"

#if HELD > 0
#include "held.cuh"
#else
#include "streamed.cuh"
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
topk_indices(const unsigned char* scores, const int* row_starts, const int* row_ends,
             const int* page_table, const int* requests, const int* offsets, unsigned* values_out,
             int* ids_out, int* slots_out, int rows, int row_length, long long row_stride,
             int top_k, int page_rows, int page_columns, long long page_stride, int page_size,
             int sorted, int nan_first) {
    __shared__ Shared shared;
    griddepcontrol_launch_dependents();
    prepare(shared);
    griddepcontrol_wait();
    const unsigned row_number = blockIdx.x / BLOCKS_PER_ROW;
    const Row row = bounded_row(scores, row_starts, row_ends, row_number, row_length, row_stride,
                                nan_first != 0);
    const OutputParameters outputs{page_table, requests,  offsets,      values_out, ids_out,    slots_out,
                                   top_k,      page_rows, page_columns, page_size,  page_stride};
    select_row(row, static_cast<unsigned>(top_k), sorted != 0, outputs, shared);
}
