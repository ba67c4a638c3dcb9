// activation_topk: routed experts and their weights from FP32 logits [tokens, experts].
//
// Steps 2 to 7 of router_runtime/spec.py, one warp per token:
//
//   2, 3  score  = sqrt(softplus(logit))          or sigmoid(logit), by the constant SCORING;
//                                                 a NaN logit: 0; an infinite one: as +-FLT_MAX
//   4     key    = fl32(score + bias)             -inf if this or the logit is a NaN
//   5     ids    = the top_k experts of largest key, in rank order; equal keys: the lower id first
//   6     weight = score / (sum + 1e-20) * scale  sum of the selected scores in rank order;
//                                                 score * scale if renormalize is 0
//   7     padding tokens                          the sentinel and zero weights
//
// The ids are always distinct and in [0, experts); all-zero scores give zero weights. With serving
// inputs (common/serving.cuh) step 4 takes the image bias for an image token, and given ids replace
// steps 4 and 5 for their tokens: those experts get weights, in their order.
//
// Grid: a CTA has TOKENS_PER_BLOCK warps and as many tokens. Warps share nothing and no barrier
// spans the CTA; shuffles and __syncwarp order the exchanges of a warp.
// A lane holds: first the logits, biases and keys of EXPERTS_CAPACITY / 32 experts (in registers,
// layout: common/selection.cuh); after the selection, lane j the expert, score and weight of rank
// j. The score of a selected expert is computed again from its logit, by the same function and thus
// with the same bits: cheaper than to keep all scores and fetch one from another lane.
// Shared memory: the selection's scratch, one per warp.
// Dependent launch (common/ptx.cuh): the wait comes first; nothing is read or written before it.
//
// Constants (build_kernels/catalog): EXPERTS_CAPACITY, the most experts; TOKENS_PER_BLOCK.
// Preconditions: 1 <= top_k <= 32, top_k <= experts <= EXPERTS_CAPACITY, row_stride >= experts
// (in elements).

#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/scoring.cuh"
#include "common/selection.cuh"
#include "common/serving.cuh"

constexpr unsigned VALUES = EXPERTS_CAPACITY / WARP;  // logits per lane
static_assert(EXPERTS_CAPACITY % (4 * WARP) == 0, "every lane loads groups of four logits");

// Steps 2 to 5 for one token: returns to lane j the expert of rank j, for j < k; other lanes get a
// value without meaning. The full warp calls it; all arguments but `lane` are the same in all
// lanes.
__device__ __forceinline__ int select_expert(const float* logits_row, const float* bias,
                                             unsigned experts, unsigned k, unsigned lane,
                                             SelectionScratch& scratch) {
    float logits[VALUES];  // 0 past the last expert
    float biases[VALUES];
    if (experts % 4 == 0 && is_aligned(logits_row, 16) && is_aligned(bias, 16)) {
#pragma unroll
        for (unsigned group = 0; group < VALUES / 4; ++group) {
            const unsigned expert = group_index(lane, group);
            float4 x = {};
            float4 b = {};
            if (expert < experts) {
                x = *reinterpret_cast<const float4*>(logits_row + expert);
                b = *reinterpret_cast<const float4*>(bias + expert);
            }
            logits[4 * group] = x.x, biases[4 * group] = b.x;
            logits[4 * group + 1] = x.y, biases[4 * group + 1] = b.y;
            logits[4 * group + 2] = x.z, biases[4 * group + 2] = b.z;
            logits[4 * group + 3] = x.w, biases[4 * group + 3] = b.w;
        }
    } else {
#pragma unroll
        for (unsigned v = 0; v < VALUES; ++v) {
            const unsigned expert = value_index(lane, v);
            logits[v] = expert < experts ? logits_row[expert] : 0.0f;
            biases[v] = expert < experts ? bias[expert] : 0.0f;
        }
    }

    // Two loops, so that the chains of softplus overlap: the square root's branch would keep them
    // apart (common/scoring.cuh), and the compiler would sink each chain down to its square root.
    float unfinished[VALUES];
#pragma unroll
    for (unsigned v = 0; v < VALUES; ++v) {
        unfinished[v] = unfinished_score(logits[v]);
        biases[v] = bias_for_key(logits[v], biases[v]);
        prevent_sinking(unfinished[v]);
        prevent_sinking(biases[v]);
    }
    unsigned keys[VALUES];
#pragma unroll
    for (unsigned v = 0; v < VALUES; ++v) {
        const unsigned key = selection_key(finished_score(unfinished[v]), biases[v]);
        keys[v] = value_index(lane, v) < experts ? key : 0;
    }

    return static_cast<int>(candidate_index(warp_top_k(keys, lane, k, scratch)));
}

extern "C" __global__ void __launch_bounds__(TOKENS_PER_BLOCK * WARP)
activation_topk(const float* logits, const float* bias, int experts, long long row_stride,
                int top_k, float* weights_out, int* ids_out, int tokens, float scale,
                int renormalize, int serving, int sentinel, int first_row, int replicas,
                const unsigned char* is_padding, const int* num_valid_tokens,
                const unsigned char* image_mask, const float* image_bias, const int* expert_map,
                const int* replica_counts, const int* given_ids_i32,
                const long long* given_ids_i64, long long* ids_out_i64, int* logical_ids_out,
                long long* logical_ids_out_i64, int replica_start, int replica_step,
                const unsigned char* given_mask, int weights_stride, int ids_stride,
                int* packed_out, int* expert_load, int load_experts,
                const unsigned char* record_load, short* captured_ids_i16, int* captured_ids_i32,
                int captured_stride, int shared_experts, int shared_id, float shared_weight) {
    __shared__ SelectionScratch scratch[TOKENS_PER_BLOCK];
    const unsigned warp = threadIdx.x / WARP;
    const unsigned lane = threadIdx.x % WARP;

    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
    const long long token = static_cast<long long>(blockIdx.x) * TOKENS_PER_BLOCK + warp;
    if (token >= tokens) return;  // whole warps; no barrier of the CTA follows

    const float* logits_row = logits + token * row_stride;
    const unsigned num_experts = static_cast<unsigned>(experts);
    const unsigned k = static_cast<unsigned>(top_k);
    const long long output = token * top_k + lane;  // of this lane, if lane < k
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

    bool selects = true;  // the same in all lanes, because it depends on the token only
    int expert = -1;      // of rank `lane`; -1: no expert
    if (serving != 0) {
        if (call.is_padding_token(token)) {
            selects = false;
        } else if (call.is_given_token(token)) {
            selects = false;
            if (lane < k) expert = call.given_expert(output, num_experts);
        } else if (call.is_image_token(token)) {
            bias = image_bias;
        }
    }
    if (selects) expert = select_expert(logits_row, bias, num_experts, k, lane, scratch[warp]);

    // Step 6. No expert scores 0, so its weight is 0 (step 7).
    const float score = lane < k && expert >= 0 ? score_of(logits_row[expert]) : 0.0f;
    const float weight = routing_weight(score, k, scale, renormalize != 0);
    if (lane < k) {
        if (serving != 0) {
            call.store(token, k, lane, weight, expert);
        } else {
            weights_out[output] = weight;
            ids_out[output] = expert;
        }
    }
}
