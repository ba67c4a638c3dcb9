// activation_topk: from FP32 logits to routed experts and their weights.
//
//   score  = sqrt(softplus(logit))           a NaN logit scores 0, infinities count as +-FLT_MAX
//   key    = fl32(score + bias)              -inf if this or the logit is NaN
//   ids    = the top_k experts with the largest key, in rank order; equal keys: the lower id first
//   weight = score / (sum + 1e-20) * scale   sum of the selected scores in rank order;
//                                            score * scale if renormalize is 0
//
// The ids are always distinct and in [0, experts). All-zero scores give zero weights.
// With serving inputs (common/parameters.py) padding tokens get the sentinel and zero weights, image
// tokens are selected by the other bias, given ids are weighed in their order.
// Preconditions: 1 <= top_k <= 32, top_k <= experts <= EXPERTS_CAPACITY, row_stride >= experts.
//
// One warp a token. The keys live in registers; a warp writes nothing but its results. The scores
// of the selected experts are computed once more from their logits, by the same function and thus
// to the same bits: one evaluation a lane is cheaper than keeping all of them.

#include "common/ptx.cuh"
#include "common/scoring.cuh"
#include "common/selection.cuh"
#include "common/serving.cuh"

constexpr unsigned VALUES = EXPERTS_CAPACITY / WARP;
static_assert(EXPERTS_CAPACITY % (4 * WARP) == 0, "every lane loads groups of four logits");

// The expert of rank `lane` among a row's, for lanes below k.
__device__ __forceinline__ int select(const float* row, const float* bias, unsigned count,
                                      unsigned k, unsigned lane, SelectionScratch& scratch) {
    float values[VALUES];
    float biases[VALUES];
    if (count % 4 == 0 && is_aligned(row, 16) && is_aligned(bias, 16)) {
#pragma unroll
        for (unsigned group = 0; group < VALUES / 4; ++group) {
            const unsigned id = first_index(lane, group);
            float4 x = {};
            float4 b = {};
            if (id < count) {
                x = *reinterpret_cast<const float4*>(row + id);
                b = *reinterpret_cast<const float4*>(bias + id);
            }
            values[4 * group] = x.x, biases[4 * group] = b.x;
            values[4 * group + 1] = x.y, biases[4 * group + 1] = b.y;
            values[4 * group + 2] = x.z, biases[4 * group + 2] = b.z;
            values[4 * group + 3] = x.w, biases[4 * group + 3] = b.w;
        }
    } else {
#pragma unroll
        for (unsigned v = 0; v < VALUES; ++v) {
            const unsigned id = first_index(lane, v / 4) + v % 4;
            values[v] = id < count ? row[id] : 0.0f;
            biases[v] = id < count ? bias[id] : 0.0f;
        }
    }

    // Two loops: a square root branches, for the sake of subnormals, and would keep the long chains
    // of operations before it from overlapping.
    float squares[VALUES];
#pragma unroll
    for (unsigned v = 0; v < VALUES; ++v) {
        squares[v] = softplus(values[v]);
        biases[v] = selection_bias(values[v], biases[v]);
        compute_here(squares[v]);
        compute_here(biases[v]);
    }
    unsigned keys[VALUES];
#pragma unroll
    for (unsigned v = 0; v < VALUES; ++v) {
        const unsigned key = ordered(__fadd_rn(__fsqrt_rn(squares[v]), biases[v]));
        keys[v] = first_index(lane, v / 4) + v % 4 < count ? key : 0;
    }

    return static_cast<int>(index_of(warp_top_k(keys, lane, k, scratch)));
}

// No pointer is __restrict__: that would let the compiler read through the non-coherent cache,
// which may not be used for what the previous grid was still writing when this one started.
extern "C" __global__ void __launch_bounds__(TOKENS_PER_BLOCK * WARP)
activation_topk(const float* logits, const float* bias, int experts, long long row_stride,
                int top_k, float* weights_out, int* ids_out, int tokens, float scale,
                int renormalize, int serving, int sentinel, int first_row, int replicas,
                const unsigned char* is_padding, const int* num_valid_tokens,
                const unsigned char* image_mask, const float* image_bias, const int* expert_map,
                const int* replica_counts, const int* given_ids_i32,
                const long long* given_ids_i64, long long* ids_out_i64, int* logical_ids_out,
                long long* logical_ids_out_i64) {
    __shared__ SelectionScratch scratch[TOKENS_PER_BLOCK];
    const unsigned warp = threadIdx.x / WARP;
    const unsigned lane = threadIdx.x % WARP;

    allow_next_grid();
    wait_for_previous_grids();
    const long long token = static_cast<long long>(blockIdx.x) * TOKENS_PER_BLOCK + warp;
    if (token >= tokens) return;  // whole warps; nothing below synchronises the block

    const float* row = logits + token * row_stride;
    const unsigned count = static_cast<unsigned>(experts);
    const unsigned k = static_cast<unsigned>(top_k);
    const long long place = token * top_k + lane;
    const Serving call = {sentinel,      first_row,      replicas,      is_padding,
                          num_valid_tokens, image_mask,  expert_map,    replica_counts,
                          given_ids_i32, given_ids_i64,  ids_out,       ids_out_i64,
                          logical_ids_out, logical_ids_out_i64};
    bool selects = true;
    int expert = -1;  // of rank `lane`
    if (serving != 0) {
        if (call.pads(token)) {
            selects = false;
        } else if (call.replays()) {
            selects = false;
            if (lane < k) expert = call.given(place, count);
        } else if (call.shows(token)) {
            bias = image_bias;
        }
    }
    if (selects) expert = select(row, bias, count, k, lane, scratch[warp]);
    const float score = lane < k && expert >= 0 ? __fsqrt_rn(softplus(row[expert])) : 0.0f;
    const float weight = routing_weight(score, k, scale, renormalize != 0);
    if (lane < k) {
        weights_out[place] = weight;
        if (serving != 0) {
            call.store_id(token, place, expert);
        } else {
            ids_out[place] = expert;
        }
    }
}
