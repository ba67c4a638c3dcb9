// hash_gate: experts by table look-up, weighed by the gate's scores of exactly these experts.
//
//   ids    = table[token id], as they stand in the table
//   logit  = dot of the hidden state with the weight row of the expert, summed as order.cuh says
//   score  = sqrt(softplus(logit))           a NaN logit scores 0, infinities count as +-FLT_MAX
//   weight = score / (sum + 1e-20) * scale   sum of the row's scores from left to right;
//                                            score * scale if renormalize is 0
//
// A token id outside [0, vocab) gets TOP_K times the sentinel and weight 0; neither the table nor a
// weight is read. With IMAGES, an image token has no use for its token id: its ids are the TOP_K
// experts with the largest score + image bias, of equal ones the lower id first, from the dots with
// all experts. Without, all tokens are looked up: that code would only be in the way of the others.
// Preconditions: 1 <= TOP_K <= 32, TOP_K <= EXPERTS <= 1024; rows of hidden states and weights start
// at multiples of 16 bytes; exactly one of token_ids_i32 and token_ids_i64 is not null.
//
// One block a token; a warp has every WARPS-th chunk of the hidden dimension, for all of the token's
// experts: with a warp for every chunk a token takes least time, with fewer more tokens are under way
// on a multiprocessor. What takes time is the chain of loads, token id, row of the table, rows of the weight, so
// every warp follows it for itself and a barrier stands only before the last sum.

#include "common/ptx.cuh"
#include "common/scoring.cuh"
#include "common/selection.cuh"
#include "common/serving.cuh"
#include "order.cuh"

constexpr unsigned ROUNDS = (CHUNKS + WARPS - 1) / WARPS;
constexpr unsigned BATCH = TOP_K > 4 ? 8 : TOP_K > 2 ? 4 : TOP_K;  // weight rows at a time
constexpr unsigned IMAGE_BATCH = 8;
constexpr unsigned KEYS = (EXPERTS + 4 * WARP - 1) / (4 * WARP) * 4;  // of an image token, a lane
static_assert(TOP_K <= WARP, "a lane for each of a token's experts");

struct Shared {
    float sums[CHUNKS][WARP];              // by chunk, of at most 32 experts
    float logits[IMAGES != 0 ? EXPERTS : 1];  // of an image token
    SelectionScratch selection;
};

template <unsigned WIDTH> struct Ints;
template <> struct Ints<1> { using Type = int; };
template <> struct Ints<2> { using Type = int2; };
template <> struct Ints<4> { using Type = int4; };

// All entries of a row of the table, to every lane.
__device__ __forceinline__ void load_row(const int* row, int (&ids)[TOP_K]) {
    constexpr unsigned WIDTH = TOP_K % 4 == 0 ? 4 : TOP_K % 2 == 0 ? 2 : 1;
    using Vector = typename Ints<WIDTH>::Type;
#pragma unroll
    for (unsigned i = 0; i < TOP_K / WIDTH; ++i) {
        const Vector entries = reinterpret_cast<const Vector*>(row)[i];
#pragma unroll
        for (unsigned j = 0; j < WIDTH; ++j) {
            ids[WIDTH * i + j] = reinterpret_cast<const int*>(&entries)[j];
        }
    }
}

// This warp's chunks of the dots of one token with COUNT experts, ids[0] to ids[COUNT - 1], into
// sums[chunk][first] and after; POWER of them at a time.
template <unsigned COUNT, unsigned POWER>
__device__ __forceinline__ void dots(const bf16* x_row, const bf16* weight, const int* ids,
                                     unsigned first, unsigned warp, unsigned lane,
                                     Shared& shared) {
#pragma unroll 1
    for (unsigned round = 0; round < ROUNDS; ++round) {
        const unsigned chunk = round * WARPS + warp;
        if (CHUNKS % WARPS != 0 && chunk >= CHUNKS) break;
        const unsigned element = chunk * K_CHUNK + lane * LANE_VALUES;
        const uint4 packed = load8(x_row, element);
#pragma unroll
        for (unsigned from = 0; from < COUNT; from += POWER) {
            uint4 rows[POWER];
#pragma unroll
            for (unsigned j = 0; j < POWER; ++j) {
                rows[j] = {};
                if (from + j < COUNT) {
                    rows[j] =
                        load8(weight + static_cast<long long>(ids[from + j]) * HIDDEN, element);
                }
            }
            const Floats8 x = widen(packed);
            float sums[POWER];
#pragma unroll
            for (unsigned j = 0; j < POWER; ++j) {
                sums[j] = from + j < COUNT ? lane_dot(x, rows[j]) : 0.0f;
            }
            const float sum = warp_sums(sums, lane);
            constexpr unsigned SHARE = WARP / POWER;  // lanes that hold the same sum
            if (lane % SHARE == 0) shared.sums[chunk][first + from + lane / SHARE] = sum;
        }
    }
}

// The logit whose chunks are in column `lane`.
__device__ __forceinline__ float logit_of(const Shared& shared, unsigned lane) {
    float logit = shared.sums[0][lane];
#pragma unroll
    for (unsigned chunk = 1; chunk < CHUNKS; ++chunk) {
        logit = __fadd_rn(logit, shared.sums[chunk][lane]);
    }
    return logit;
}

// Ids and logits of an image token, to lane j of warp 0 those of rank j. All threads call it.
__device__ __forceinline__ void select_for_image(const bf16* x_row, const bf16* weight,
                                                 const float* image_bias, unsigned warp,
                                                 unsigned lane, Shared& shared, int& id,
                                                 float& logit) {
#pragma unroll 1
    for (unsigned base = 0; base < EXPERTS; base += WARP) {
#pragma unroll 1
        for (unsigned first = 0; first < WARP; first += IMAGE_BATCH) {
            int ids[IMAGE_BATCH];
#pragma unroll
            for (unsigned j = 0; j < IMAGE_BATCH; ++j) ids[j] = min(base + first + j, EXPERTS - 1);
            dots<IMAGE_BATCH, IMAGE_BATCH>(x_row, weight, ids, first, warp, lane, shared);
        }
        __syncthreads();
        if (warp == 0 && base + lane < EXPERTS) shared.logits[base + lane] = logit_of(shared, lane);
        __syncthreads();
    }
    if (warp != 0) return;
    unsigned keys[KEYS];
#pragma unroll
    for (unsigned v = 0; v < KEYS; ++v) {
        const unsigned expert = first_index(lane, v / 4) + v % 4;
        keys[v] = 0;
        if (expert < EXPERTS) {
            const float z = shared.logits[expert];
            const float score = __fsqrt_rn(softplus(z));
            keys[v] = ordered(__fadd_rn(score, selection_bias(z, image_bias[expert])));
        }
    }
    id = static_cast<int>(index_of(warp_top_k(keys, lane, TOP_K, shared.selection)));
    logit = lane < TOP_K ? shared.logits[id] : 0.0f;
}

// No pointer is __restrict__: that would let the compiler read through the non-coherent cache,
// which may not be used for what the previous grid was still writing when this one started.
// One block a multiprocessor is all that is asked for: with more, the compiler saves registers by
// waiting for some of a token's weight rows before it asks for the others.
extern "C" __global__ void __launch_bounds__(WARPS * WARP, 1)
hash_gate(const bf16* hidden_states, const int* token_ids_i32, const long long* token_ids_i64,
          const bf16* weight, const int* table, long long row_stride, int vocab,
          float* weights_out, int* ids_out, int tokens, float scale, int renormalize, int serving,
          int sentinel, int first_row, int replicas, const unsigned char* is_padding,
          const int* num_valid_tokens, const unsigned char* image_mask, const float* image_bias,
          const int* expert_map, const int* replica_counts, long long* ids_out_i64,
          int* logical_ids_out, long long* logical_ids_out_i64) {
    __shared__ Shared shared;
    const unsigned warp = threadIdx.x / WARP;
    const unsigned lane = threadIdx.x % WARP;
    const long long token = blockIdx.x;
    const Serving call = {sentinel,      first_row,        replicas,   is_padding,
                          num_valid_tokens, image_mask,    expert_map, replica_counts,
                          nullptr,       nullptr,          ids_out,    ids_out_i64,
                          logical_ids_out, logical_ids_out_i64};

    allow_next_grid();
    // Where a single token has to be fast, the first access to a page should not be on its way.
    if (ROUNDS == 1 && warp == 0) {
        prefetch(table + static_cast<long long>(vocab) * TOP_K / WARP * lane);
        prefetch(weight + EXPERTS * HIDDEN / WARP * lane);
    }
    wait_for_previous_grids();
    const bf16* x_row = hidden_states + token * row_stride;
    int id = -1;  // no expert
    float logit = 0.0f;
    bool routed = true;  // the same for all threads, as every condition before the last barrier
    if (serving != 0 && call.pads(token)) {
        routed = false;
    } else if (IMAGES != 0 && serving != 0 && call.shows(token)) {
        select_for_image(x_row, weight, image_bias, warp, lane, shared, id, logit);
    } else {
        const long long token_id =
            token_ids_i64 != nullptr ? token_ids_i64[token] : token_ids_i32[token];
        routed = token_id >= 0 && token_id < vocab;
        if (routed) {
            const int* row = table + token_id * TOP_K;
            int ids[TOP_K];
            load_row(row, ids);
            if (warp == 0 && lane < TOP_K) id = row[lane];
            dots<TOP_K, BATCH>(x_row, weight, ids, 0, warp, lane, shared);
            __syncthreads();
            if (warp == 0 && lane < TOP_K) logit = logit_of(shared, lane);
        }
    }
    if (warp != 0) return;

    const float score = routed && lane < TOP_K ? __fsqrt_rn(softplus(logit)) : 0.0f;
    const float result = routing_weight(score, TOP_K, scale, renormalize != 0);
    if (lane < TOP_K) {
        const long long place = token * TOP_K + lane;
        weights_out[place] = result;
        if (serving != 0) {
            call.store_id(token, place, id);
        } else {
            ids_out[place] = routed ? id : sentinel;
        }
    }
}
