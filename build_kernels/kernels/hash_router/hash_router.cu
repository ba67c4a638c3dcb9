// hash_router: experts by table look-up, all with the same weight.
//
//   ids = table[token id], as it stands in the table; weight = fl32(1 / top_k)
//
// A token id outside [0, vocab) gets top_k times the sentinel and weight 0, and the table is not
// read.
// Preconditions: 1 <= top_k <= 32; exactly one of token_ids_i32 and token_ids_i64 is not null.
//
// A thread moves WIDTH consecutive entries of one token: 4, 2 or 1, as top_k and the addresses
// allow. With serving inputs (common/parameters.py) it moves one, and padding tokens are like tokens
// outside the vocabulary.

#include "common/ptx.cuh"
#include "common/serving.cuh"

template <unsigned WIDTH> struct Vector;
template <> struct Vector<1> { using Ints = int; using Floats = float; };
template <> struct Vector<2> { using Ints = int2; using Floats = float2; };
template <> struct Vector<4> { using Ints = int4; using Floats = float4; };

__device__ __forceinline__ void fill(int& to, int value) { to = value; }
__device__ __forceinline__ void fill(int2& to, int value) { to = {value, value}; }
__device__ __forceinline__ void fill(int4& to, int value) { to = {value, value, value, value}; }
__device__ __forceinline__ void fill(float& to, float value) { to = value; }
__device__ __forceinline__ void fill(float2& to, float value) { to = {value, value}; }
__device__ __forceinline__ void fill(float4& to, float value) { to = {value, value, value, value}; }

template <unsigned WIDTH>
__device__ __forceinline__ void route(const int* token_ids_i32, const long long* token_ids_i64,
                                      const int* table, float* weights_out, int* ids_out,
                                      long long first_token, unsigned block_tokens, int vocab,
                                      unsigned top_k, int sentinel) {
    using Ints = typename Vector<WIDTH>::Ints;
    using Floats = typename Vector<WIDTH>::Floats;
    const float weight = __fdiv_rn(1.0f, static_cast<float>(top_k));
    const unsigned pieces = top_k / WIDTH;  // of a token
    for (unsigned i = threadIdx.x; i < block_tokens * pieces; i += THREADS) {
        const long long token = first_token + i / pieces;
        const unsigned place = i % pieces * WIDTH;
        const long long token_id =
            token_ids_i64 != nullptr ? token_ids_i64[token] : token_ids_i32[token];
        const bool known = token_id >= 0 && token_id < vocab;
        Ints ids;
        Floats weights;
        fill(ids, sentinel);
        fill(weights, known ? weight : 0.0f);
        if (known) ids = *reinterpret_cast<const Ints*>(table + token_id * top_k + place);
        *reinterpret_cast<Ints*>(ids_out + token * top_k + place) = ids;
        *reinterpret_cast<Floats*>(weights_out + token * top_k + place) = weights;
    }
}

__device__ __forceinline__ void serve(const int* token_ids_i32, const long long* token_ids_i64,
                                      const int* table, float* weights_out, long long first_token,
                                      unsigned block_tokens, int vocab, unsigned top_k,
                                      const Serving& call) {
    const float weight = __fdiv_rn(1.0f, static_cast<float>(top_k));
    for (unsigned i = threadIdx.x; i < block_tokens * top_k; i += THREADS) {
        const long long token = first_token + i / top_k;
        const long long place = first_token * top_k + i;
        const long long token_id =
            token_ids_i64 != nullptr ? token_ids_i64[token] : token_ids_i32[token];
        const bool known = token_id >= 0 && token_id < vocab && !call.pads(token);
        weights_out[place] = known ? weight : 0.0f;
        call.store_id(token, place, known ? table[token_id * top_k + i % top_k] : -1);
    }
}

__device__ __forceinline__ bool fits(unsigned width, unsigned top_k, const void* table,
                                     const void* weights_out, const void* ids_out) {
    const unsigned bytes = width * 4;
    return top_k % width == 0 && is_aligned(table, bytes) && is_aligned(weights_out, bytes) &&
           is_aligned(ids_out, bytes);
}

// No pointer is __restrict__: that would let the compiler read through the non-coherent cache,
// which may not be used for what the previous grid was still writing when this one started.
extern "C" __global__ void __launch_bounds__(THREADS)
hash_router(const int* token_ids_i32, const long long* token_ids_i64, const int* table, int vocab,
            int top_k, float* weights_out, int* ids_out, int tokens, int serving, int sentinel,
            int first_row, int replicas, const unsigned char* is_padding,
            const int* num_valid_tokens, const int* expert_map, const int* replica_counts,
            long long* ids_out_i64, int* logical_ids_out, long long* logical_ids_out_i64) {
    allow_next_grid();
    wait_for_previous_grids();
    const long long first = static_cast<long long>(blockIdx.x) * TOKENS_PER_BLOCK;
    const unsigned count =
        static_cast<unsigned>(min(tokens - first, static_cast<long long>(TOKENS_PER_BLOCK)));
    const unsigned k = static_cast<unsigned>(top_k);
    if (serving != 0) {
        const Serving call = {sentinel,      first_row,     replicas,        is_padding,
                              num_valid_tokens, nullptr,    expert_map,      replica_counts,
                              nullptr,       nullptr,       ids_out,         ids_out_i64,
                              logical_ids_out, logical_ids_out_i64};
        serve(token_ids_i32, token_ids_i64, table, weights_out, first, count, vocab, k, call);
    } else if (fits(4, k, table, weights_out, ids_out)) {
        route<4>(token_ids_i32, token_ids_i64, table, weights_out, ids_out, first, count, vocab, k,
                 sentinel);
    } else if (fits(2, k, table, weights_out, ids_out)) {
        route<2>(token_ids_i32, token_ids_i64, table, weights_out, ids_out, first, count, vocab, k,
                 sentinel);
    } else {
        route<1>(token_ids_i32, token_ids_i64, table, weights_out, ids_out, first, count, vocab, k,
                 sentinel);
    }
}
