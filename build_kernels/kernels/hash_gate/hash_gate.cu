// hash_gate: experts by table look-up, with weights from the gate's scores of exactly these
// experts.
//
//   ids    = table[token id], unchanged and in the table's order
//
// then, of router_runtime/spec.py, for these experts and in this order:
//
//   1     logit  = dot(hidden state, weight row of the expert), in the order of dot_product.cuh
//   2, 3  score  = sqrt(softplus(logit))          a NaN logit: 0; an infinite one: as +-FLT_MAX
//   6     weight = score / (sum + 1e-20) * scale  sum of the token's scores in the table's order;
//                                                 score * scale if renormalize is 0
//   7     padding tokens                          the sentinel and zero weights
//
// A token id outside [0, vocab) counts as padding: neither the table nor a weight row is read.
// Given ids (common/serving.cuh) take the place of the table's row, and of an image token's choice.
// Image tokens (only if IMAGES is 1) do not use their token id: their ids are the TOP_K experts by
// steps 1 to 5 over all experts, with the image bias. That code is compiled only into the variant
// that serves calls with an image mask, because it makes all other calls slower (NOTES.md).
//
// Grid: one CTA of WARPS warps per token. Warp w has the chunks w, w + WARPS, w + 2 WARPS, ... of
// the hidden dimension, for all experts of the token. One warp per chunk gives the shortest time
// for a single token; with fewer warps, more tokens run on a multiprocessor at once.
//
// One token is a chain of dependent loads: token id, table row, weight rows. Every warp follows the
// chain for itself, without a barrier. Steps:
//
//   1. All lanes of all warps load the token id and the token's row of the table.
//   2. For each chunk of its warp, a lane loads 8 elements of the hidden state and of each weight
//      row and sums the products; shuffles add up the lanes; the chunk's sum of each expert goes to
//      shared memory (compute_chunk_sums).
//   3. __syncthreads orders the chunk sums before their loads.
//   4. Lane j of warp 0 adds the chunk sums of the expert of rank j, computes its score and, by
//      shuffles, its weight, and stores the result. The other warps exit.
//
// Dependent launch (common/ptx.cuh): before the wait, and only where each warp has one chunk, warp
// 0 prefetches one cache line of every 1/32 of table and weight, so that the pages' translations
// are known when the chain starts. Everything else comes after the wait.
//
// Constants (build_kernels/catalog, contract.py): HIDDEN, EXPERTS, TOP_K, WARPS, IMAGES.
// Preconditions: 1 <= TOP_K <= 32, TOP_K <= EXPERTS <= 1024; rows of hidden states and weights
// start at multiples of 16 bytes (row_stride in elements), the table at a multiple of 16 bytes;
// exactly one of token_ids_i32 and token_ids_i64 is not null.

#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/scoring.cuh"
#include "common/selection.cuh"
#include "common/serving.cuh"
#include "dot_product.cuh"

constexpr unsigned ROUNDS = (CHUNKS + WARPS - 1) / WARPS;  // most chunks of one warp
constexpr unsigned BATCH = TOP_K > 4 ? 8 : TOP_K > 2 ? 4 : TOP_K;  // weight rows loaded at a time
constexpr unsigned IMAGE_BATCH = 8;                                // the same for image tokens
constexpr unsigned KEYS = (EXPERTS + 4 * WARP - 1) / (4 * WARP) * 4;  // per lane, of an image token
static_assert(TOP_K <= WARP, "a lane for each of a token's experts");

// The shared memory of a CTA.
struct Shared {
    float chunk_sums[CHUNKS][WARP];           // [chunk][column], a column per expert, up to 32
    float logits[IMAGES != 0 ? EXPERTS : 1];  // of an image token
    SelectionScratch selection;               // of warp 0
};

// Loads all TOP_K entries of a table row into every lane that calls it. The row is aligned to its
// widest vector that divides TOP_K.
__device__ __forceinline__ void load_table_row(const int* row, int (&ids)[TOP_K]) {
    constexpr unsigned WIDTH = TOP_K % 4 == 0 ? 4 : TOP_K % 2 == 0 ? 2 : 1;
    using Ints = typename Vector<WIDTH>::Ints;
#pragma unroll
    for (unsigned i = 0; i < TOP_K / WIDTH; ++i) {
        const Ints entries = reinterpret_cast<const Ints*>(row)[i];
#pragma unroll
        for (unsigned j = 0; j < WIDTH; ++j) {
            ids[WIDTH * i + j] = reinterpret_cast<const int*>(&entries)[j];
        }
    }
}

// Loads the given experts of a token into every lane: 0 for an id that is no expert, whose sums are
// not used. Returns to lane j the expert of rank j, -1 for none. The full warp calls it. Shuffles
// instead of a load for each id keep the code short that plain calls jump over.
__device__ __forceinline__ int load_given_experts(const Serving& call, long long token,
                                                  unsigned lane, int (&ids)[TOP_K]) {
    const int own = lane < TOP_K ? call.given_expert(token * TOP_K + lane, EXPERTS) : -1;
#pragma unroll
    for (unsigned j = 0; j < TOP_K; ++j) ids[j] = max(__shfl_sync(ALL_LANES, own, j), 0);
    return own;
}

// Computes this warp's chunks of the dots of one token with the experts ids[0] to ids[COUNT - 1],
// ROWS weight rows at a time, and stores the sums to chunk_sums[chunk][first_column + i].
//
// The full warp calls it, every warp of the CTA for its own chunks. No barrier inside: the caller
// synchronises the CTA before the sums are read.
template <unsigned COUNT, unsigned ROWS>
__device__ __forceinline__ void compute_chunk_sums(const bf16* x_row, const bf16* weight,
                                                   const int* ids, unsigned first_column,
                                                   unsigned warp, unsigned lane, Shared& shared) {
#pragma unroll 1
    for (unsigned round = 0; round < ROUNDS; ++round) {
        const unsigned chunk = round * WARPS + warp;
        if (CHUNKS % WARPS != 0 && chunk >= CHUNKS) break;
        const unsigned element = chunk * K_CHUNK + lane * LANE_VALUES;
        const uint4 packed_x = load_8_elements(x_row, element);
#pragma unroll
        for (unsigned first = 0; first < COUNT; first += ROWS) {
            uint4 rows[ROWS];  // zeros past the last expert
#pragma unroll
            for (unsigned j = 0; j < ROWS; ++j) {
                rows[j] = {};
                if (first + j < COUNT) {
                    const long long expert = ids[first + j];
                    rows[j] = load_8_elements(weight + expert * HIDDEN, element);
                }
            }
            const Floats8 x = to_floats(packed_x);
            float sums[ROWS];
#pragma unroll
            for (unsigned j = 0; j < ROWS; ++j) {
                sums[j] = first + j < COUNT ? dot_of_lane(x, rows[j]) : 0.0f;
            }
            const float sum = sum_over_warp(sums, lane);
            constexpr unsigned LANES_PER_SUM = WARP / ROWS;  // adjacent lanes with the same sum
            if (lane % LANES_PER_SUM == 0) {
                shared.chunk_sums[chunk][first_column + first + lane / LANES_PER_SUM] = sum;
            }
        }
    }
}

// The logit whose chunk sums are in `column`: their sum in ascending order. Called by one lane,
// after the CTA's barrier.
__device__ __forceinline__ float logit_of_column(const Shared& shared, unsigned column) {
    float logit = shared.chunk_sums[0][column];
#pragma unroll
    for (unsigned chunk = 1; chunk < CHUNKS; ++chunk) {
        logit = __fadd_rn(logit, shared.chunk_sums[chunk][column]);
    }
    return logit;
}

// Steps 1 to 5 for an image token: leaves in `id` and `logit` of lane j of warp 0, j < TOP_K, those
// of rank j; other threads get nothing that they may use. All threads of the CTA call it.
//
// 32 experts at a time: every warp sums its chunks of their dots, barrier, warp 0 adds up 32
// logits, barrier (the columns may be overwritten). Then warp 0 selects among all logits.
__device__ __forceinline__ void select_image_experts(const bf16* x_row, const bf16* weight,
                                                     const float* image_bias, unsigned warp,
                                                     unsigned lane, Shared& shared, int& id,
                                                     float& logit) {
#pragma unroll 1
    for (unsigned base = 0; base < EXPERTS; base += WARP) {
#pragma unroll 1
        for (unsigned first = 0; first < WARP; first += IMAGE_BATCH) {
            int ids[IMAGE_BATCH];  // past the last expert: the last again, sums not used
#pragma unroll
            for (unsigned j = 0; j < IMAGE_BATCH; ++j) ids[j] = min(base + first + j, EXPERTS - 1);
            compute_chunk_sums<IMAGE_BATCH, IMAGE_BATCH>(x_row, weight, ids, first, warp, lane,
                                                         shared);
        }
        __syncthreads();
        if (warp == 0 && base + lane < EXPERTS) {
            shared.logits[base + lane] = logit_of_column(shared, lane);
        }
        __syncthreads();
    }
    if (warp != 0) return;
    unsigned keys[KEYS];
#pragma unroll
    for (unsigned v = 0; v < KEYS; ++v) {
        const unsigned expert = value_index(lane, v);
        keys[v] = 0;
        if (expert < EXPERTS) {
            const float expert_logit = shared.logits[expert];
            keys[v] = selection_key(score_of(expert_logit),
                                    bias_for_key(expert_logit, image_bias[expert]));
        }
    }
    id = static_cast<int>(candidate_index(warp_top_k(keys, lane, TOP_K, shared.selection)));
    logit = lane < TOP_K ? shared.logits[id] : 0.0f;
}

// The launch bound requests one CTA per multiprocessor only: with more, the compiler saves
// registers by waiting for some of a token's weight rows before it loads the others.
extern "C" __global__ void __launch_bounds__(WARPS * WARP, 1)
hash_gate(const bf16* hidden_states, const int* token_ids_i32, const long long* token_ids_i64,
          const bf16* weight, const int* table, long long row_stride, int vocab,
          float* weights_out, int* ids_out, int tokens, float scale, int renormalize, int serving,
          int sentinel, int first_row, int replicas, const unsigned char* is_padding,
          const int* num_valid_tokens, const unsigned char* image_mask, const float* image_bias,
          const int* expert_map, const int* replica_counts, const int* given_ids_i32,
          const long long* given_ids_i64, long long* ids_out_i64, int* logical_ids_out,
          long long* logical_ids_out_i64, int replica_start, int replica_step,
          const unsigned char* given_mask, int weights_stride, int ids_stride, int* packed_out,
          int* expert_load, int load_experts, const unsigned char* record_load,
          short* captured_ids_i16, int* captured_ids_i32, int captured_stride, int shared_experts,
          int shared_id, float shared_weight) {
    __shared__ Shared shared;
    const unsigned warp = threadIdx.x / WARP;
    const unsigned lane = threadIdx.x % WARP;
    const long long token = blockIdx.x;
    const Serving call = {serving,
                          sentinel,
                          first_row,
                          replicas,
                          is_padding,
                          num_valid_tokens,
                          image_mask,
                          expert_map,
                          replica_counts,
                          given_ids_i32,
                          given_ids_i64,
                          weights_out,
                          ids_out,
                          ids_out_i64,
                          logical_ids_out,
                          logical_ids_out_i64,
                          static_cast<unsigned>(replica_start),
                          static_cast<unsigned>(replica_step),
                          given_mask,
                          {weights_stride, ids_stride, packed_out, expert_load, load_experts,
                           record_load, captured_ids_i16, captured_ids_i32, captured_stride,
                           shared_experts, shared_id, shared_weight}};

    griddepcontrol_launch_dependents();
    if (ROUNDS == 1 && warp == 0) {
        prefetch_l2(table + static_cast<long long>(vocab) * TOP_K / WARP * lane);
        prefetch_l2(weight + EXPERTS * HIDDEN / WARP * lane);
    }
    griddepcontrol_wait();

    const bf16* x_row = hidden_states + token * row_stride;
    int id = -1;  // of rank `lane`, in warp 0; -1: no expert
    float logit = 0.0f;
    // Every condition down to the last barrier depends on the token only, so it is the same in all
    // threads of the CTA.
    bool routed = true;
    if (serving != 0 && call.is_padding_token(token)) {
        routed = false;
    } else if (IMAGES != 0 && serving != 0 && call.is_image_token(token) &&
               !call.is_given_token(token)) {
        select_image_experts(x_row, weight, image_bias, warp, lane, shared, id, logit);
    } else {
        int ids[TOP_K];
        if (serving != 0 && call.is_given_token(token)) {
            id = load_given_experts(call, token, lane, ids);
        } else {
            const long long token_id = load_i32_or_i64(token_ids_i32, token_ids_i64, token);
            routed = token_id >= 0 && token_id < vocab;
            if (routed) {
                const int* table_row = table + token_id * TOP_K;
                load_table_row(table_row, ids);
                if (warp == 0 && lane < TOP_K) id = table_row[lane];
            }
        }
        if (routed) {
            compute_chunk_sums<TOP_K, BATCH>(x_row, weight, ids, 0, warp, lane, shared);
            __syncthreads();
            if (warp == 0 && lane < TOP_K) logit = logit_of_column(shared, lane);
            // The score of a NaN is 0: that of a given id that is no expert.
            if (serving != 0 && id < 0) logit = __int_as_float(NAN_LOGIT_BITS);
        }
    }
    if (warp != 0) return;

    const float score = routed && lane < TOP_K ? score_of(logit) : 0.0f;
    const float result = routing_weight(score, TOP_K, scale, renormalize != 0);
    if (lane < TOP_K) {
        if (serving != 0) {
            call.store(token, TOP_K, lane, result, id);
        } else {
            const long long output = token * TOP_K + lane;
            weights_out[output] = result;
            ids_out[output] = routed ? id : sentinel;
        }
    }
}
