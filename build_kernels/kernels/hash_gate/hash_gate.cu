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
// Grid: one CTA of WARPS warps per token. The warps divide the groups of chunks of the hidden
// dimension (dot_product.cuh), EXPERT_WARPS warps for each, which divide the token's experts,
// COLUMN_EXPERTS at a time. The shortest time for a single token comes from a warp for each of these
// tasks; with fewer warps, more tokens run on a multiprocessor at once.
//
// One token is a chain of dependent loads: token id, table row, weight rows. Every warp follows the
// chain for itself, without a barrier. Steps:
//
//   1. A warp starts to load its part of the hidden state. All lanes of all warps load the token id
//      and, of the token's row of the table, the experts of their columns.
//   2. A warp loads its parts of the weight rows and multiplies. The sums of its columns go to shared
//      memory (compute_chunk_sums).
//   3. __syncthreads orders the chunk sums before their loads.
//   4. Lane j of warp 0 adds the chunk sums of the expert of rank j, computes its score and, by
//      shuffles, its weight, and stores the result. The other warps exit.
//
// Dependent launch (common/ptx.cuh): before the wait, and only where each warp has one task, warp 0
// prefetches 32 cache lines of the table and 32 of the weight, evenly spread, so that the addresses
// of their memory pages have been translated when the chain starts. Everything else comes after the
// wait.
//
// Constants (build_kernels/catalog, contract.py): HIDDEN, EXPERTS, TOP_K, IMAGES, WARPS,
// EXPERT_WARPS, SLICES.
// Preconditions: 1 <= TOP_K <= 32, TOP_K <= EXPERTS <= 1024; rows of hidden states and the packed
// weight start at multiples of 16 bytes (row_stride in elements); exactly one of token_ids_i32 and
// token_ids_i64 is not null.

#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/scoring.cuh"
#include "common/selection.cuh"
#include "common/serving.cuh"
#include "dot_product.cuh"

constexpr unsigned GROUP_WARPS = WARPS / EXPERT_WARPS;
static_assert(GROUP_WARPS * EXPERT_WARPS == WARPS, "EXPERT_WARPS warps for each group");
constexpr unsigned ROUNDS =  // most times that a warp takes COLUMN_EXPERTS of a token's experts
    (TOP_K + COLUMN_EXPERTS * EXPERT_WARPS - 1) / (COLUMN_EXPERTS * EXPERT_WARPS);
constexpr bool ONE_TASK = ROUNDS == 1 && GROUP_WARPS == GROUPS;  // of each warp
constexpr unsigned KEYS = (EXPERTS + 4 * WARP - 1) / (4 * WARP) * 4;  // per lane, of an image token
static_assert(TOP_K <= WARP, "a lane for each of a token's experts");

// The shared memory of a CTA.
struct Shared {
    HiddenStateGroup hidden_state[WARPS];     // of each warp
    float chunk_sums[CHUNKS][WARP];           // [chunk][column], a column per expert, up to 32
    float logits[IMAGES != 0 ? EXPERTS : 1];  // of an image token
    SelectionScratch selection;               // of warp 0
};

// The place among COUNT experts of this lane's column in a round: the last one for columns that are
// not used.
template <unsigned COUNT>
__device__ __forceinline__ unsigned rank_of_column(unsigned round, unsigned warp, unsigned lane) {
    const unsigned turn = round * EXPERT_WARPS + warp / GROUP_WARPS;
    const unsigned rank = turn * COLUMN_EXPERTS + lane / (4 * TOGETHER);
    return min(rank, COUNT - 1);
}

// Loads the given experts of a token: to ids[round] that of this lane's column, 0 for an id that is
// no expert, whose sums are not used. Returns to lane j the expert of rank j, -1 for none. The full
// warp calls it. Shuffles instead of a load for each id keep the code short that plain calls jump
// over.
__device__ __forceinline__ int load_given_experts(const Serving& call, long long token,
                                                  unsigned warp, unsigned lane,
                                                  int (&ids)[ROUNDS]) {
    const int own = lane < TOP_K ? call.given_expert(token * TOP_K + lane, EXPERTS) : -1;
#pragma unroll
    for (unsigned round = 0; round < ROUNDS; ++round) {
        const unsigned rank = rank_of_column<TOP_K>(round, warp, lane);
        ids[round] = max(__shfl_sync(ALL_LANES, own, rank), 0);
    }
    return own;
}

// Loads the table's experts of a token in the same way. Each lane may call it.
__device__ __forceinline__ int load_table_row(const int* row, unsigned warp, unsigned lane,
                                              int (&ids)[ROUNDS]) {
#pragma unroll
    for (unsigned round = 0; round < ROUNDS; ++round) {
        ids[round] = row[rank_of_column<TOP_K>(round, warp, lane)];
    }
    return warp == 0 && lane < TOP_K ? row[lane] : -1;
}

// Stores the sums of this warp's columns, c of `multiply`, to shared.chunk_sums[chunk][column], the
// columns of experts from `first` on. The lane of row g has the columns of chunk g % TOGETHER.
__device__ __forceinline__ void store_chunk_sums(const float (&c)[4], unsigned group,
                                                 unsigned first, unsigned lane, Shared& shared) {
    constexpr unsigned ROWS = TOGETHER > 2 ? TOGETHER : 2;  // in which all columns are found
    const unsigned row = lane / 4;
    const unsigned column = lane % 4 * 2 + row % 2;
    const unsigned chunk = column % TOGETHER;
    if (row < ROWS && chunk == row % TOGETHER) {
        shared.chunk_sums[group * TOGETHER + chunk][first + column / TOGETHER] =
            row % 2 == 0 ? c[0] : c[1];
    }
}

// Computes this warp's part of the chunk sums of one token and COUNT experts, and stores them to
// shared.chunk_sums. expert_of(round, rank) is the expert of this lane's column, which is the one of
// that rank among them. `x` is the warp's first group, whose load has been started.
//
// The full warp calls it, every warp of the CTA for its own part. No barrier inside: the caller
// synchronises the CTA before the sums are read.
template <unsigned COUNT, unsigned UNROLL, typename ExpertOf>
__device__ __forceinline__ void compute_chunk_sums(const bf16* x_row, const bf16* packed_weight,
                                                   const ExpertOf& expert_of, HiddenStateLoads x,
                                                   unsigned warp, unsigned lane, Shared& shared) {
    constexpr unsigned TURNS = (COUNT + COLUMN_EXPERTS - 1) / COLUMN_EXPERTS;
#pragma unroll 1
    for (unsigned first = 0; first < GROUPS; first += GROUP_WARPS) {
        const unsigned group = first + warp % GROUP_WARPS;
        if (GROUPS % GROUP_WARPS != 0 && group >= GROUPS) break;
#pragma unroll UNROLL
        for (unsigned round = 0; round < (TURNS + EXPERT_WARPS - 1) / EXPERT_WARPS; ++round) {
            const unsigned turn = round * EXPERT_WARPS + warp / GROUP_WARPS;
            if (TURNS % EXPERT_WARPS != 0 && turn >= TURNS) break;
            WeightLoads w;
            const int expert = expert_of(round, rank_of_column<COUNT>(round, warp, lane));
            load_weights(packed_weight, expert, group, lane, w);
            if (round == 0) {
                store_hidden_state(x, lane, shared.hidden_state[warp]);
                if (GROUP_WARPS < GROUPS && group + GROUP_WARPS < GROUPS) {
                    load_hidden_state(x_row, group + GROUP_WARPS, lane, x);
                }
            }
            float c[4];
            multiply(shared.hidden_state[warp], w, group, lane, c);
            store_chunk_sums(c, group, turn * COLUMN_EXPERTS, lane, shared);
        }
    }
}

// Steps 1 to 5 for an image token: leaves in `id` and `logit` of lane j of warp 0, j < TOP_K, those
// of rank j; other threads get nothing that they may use. All threads of the CTA call it.
//
// 32 experts at a time: every warp sums its chunks of their dots, barrier, warp 0 adds up 32
// logits, barrier (the columns may be overwritten). Then warp 0 selects among all logits.
__device__ __forceinline__ void select_image_experts(const bf16* x_row, const bf16* packed_weight,
                                                     const float* image_bias,
                                                     const HiddenStateLoads& x, unsigned warp,
                                                     unsigned lane, Shared& shared, int& id,
                                                     float& logit) {
#pragma unroll 1
    for (unsigned base = 0; base < EXPERTS; base += WARP) {
        const auto expert_of = [base](unsigned, unsigned rank) {
            return static_cast<int>(min(base + rank, EXPERTS - 1));
        };
        compute_chunk_sums<WARP, 1>(x_row, packed_weight, expert_of, x, warp, lane, shared);
        __syncthreads();
        if (warp == 0 && base + lane < EXPERTS) {
            shared.logits[base + lane] = add_chunks(shared.chunk_sums, lane);
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
          const bf16* packed_weight, const int* table, long long row_stride, int vocab,
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
    if (ONE_TASK && warp == 0) {
        prefetch_l2(table + static_cast<long long>(vocab) * TOP_K / WARP * lane);
        prefetch_l2(packed_weight + EXPERTS * HIDDEN / WARP * lane);
    }
    griddepcontrol_wait();

    const bf16* x_row = hidden_states + token * row_stride;
    // A token that has no expert needs none of this, but the others save the time of it.
    HiddenStateLoads x;
    load_hidden_state(x_row, warp % GROUP_WARPS, lane, x);
    int id = -1;  // of rank `lane`, in warp 0; -1: no expert
    float logit = 0.0f;
    // Every condition down to the last barrier depends on the token only, so it is the same in all
    // threads of the CTA.
    bool routed = true;
    if (serving != 0 && call.is_padding_token(token)) {
        routed = false;
    } else if (IMAGES != 0 && serving != 0 && call.is_image_token(token) &&
               !call.is_given_token(token)) {
        select_image_experts(x_row, packed_weight, image_bias, x, warp, lane, shared, id, logit);
    } else {
        int ids[ROUNDS];  // the experts of this lane's columns
        if (serving != 0 && call.is_given_token(token)) {
            id = load_given_experts(call, token, warp, lane, ids);
        } else {
            const long long token_id = load_i32_or_i64(token_ids_i32, token_ids_i64, token);
            routed = token_id >= 0 && token_id < vocab;
            if (routed) id = load_table_row(table + token_id * TOP_K, warp, lane, ids);
        }
        if (routed) {
            const auto expert_of = [&ids](unsigned round, unsigned) { return ids[round]; };
            compute_chunk_sums<TOP_K, ROUNDS>(x_row, packed_weight, expert_of, x, warp, lane,
                                              shared);
            __syncthreads();
            if (warp == 0 && lane < TOP_K) logit = add_chunks(shared.chunk_sums, lane);
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
