// hash_router: experts by table look-up, all with the same weight.
//
//   ids = table[token id], unchanged and in the table's order;  weight = fl32(1 / top_k)
//
// Nothing is scored: of router_runtime/spec.py only step 7 applies. A padding token, and a token
// whose id is outside [0, vocab), gets top_k times the sentinel and weight 0; the table is not read
// for it.
//
// Grid: a CTA has TOKENS_PER_BLOCK tokens and THREADS threads. Without serving inputs a thread
// moves WIDTH consecutive entries of one token's row at a time, with one load and two stores: 4, 2
// or 1, the most that top_k and the alignment of the three arrays allow. With serving inputs
// (common/serving.cuh) it moves one entry at a time. Threads share nothing, so there is no barrier
// and no shared memory.
// Dependent launch (common/ptx.cuh): the wait comes first; nothing is read or written before it.
//
// Constants (build_kernels/catalog): THREADS, TOKENS_PER_BLOCK.
// Preconditions: 1 <= top_k <= 32; exactly one of token_ids_i32 and token_ids_i64 is not null.

#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/serving.cuh"

// Sets every element of a vector to `value`.
__device__ __forceinline__ void fill(int& to, int value) { to = value; }
__device__ __forceinline__ void fill(int2& to, int value) { to = {value, value}; }
__device__ __forceinline__ void fill(int4& to, int value) { to = {value, value, value, value}; }
__device__ __forceinline__ void fill(float& to, float value) { to = value; }
__device__ __forceinline__ void fill(float2& to, float value) { to = {value, value}; }
__device__ __forceinline__ void fill(float4& to, float value) { to = {value, value, value, value}; }

// Writes ids and weights of the CTA's tokens, `cta_tokens` from `first_token` on, WIDTH entries at
// a time. All threads of the CTA call it. WIDTH divides top_k, and the arrays are aligned for it.
template <unsigned WIDTH>
__device__ __forceinline__ void route(const int* token_ids_i32, const long long* token_ids_i64,
                                      const int* table, float* weights_out, int* ids_out,
                                      long long first_token, unsigned cta_tokens, int vocab,
                                      unsigned top_k, int sentinel) {
    using Ints = typename Vector<WIDTH>::Ints;
    using Floats = typename Vector<WIDTH>::Floats;
    const float weight = __fdiv_rn(1.0f, static_cast<float>(top_k));
    const unsigned vectors_per_token = top_k / WIDTH;
    for (unsigned i = threadIdx.x; i < cta_tokens * vectors_per_token; i += THREADS) {
        const long long token = first_token + i / vectors_per_token;
        const unsigned rank = i % vectors_per_token * WIDTH;  // of the vector's first entry
        const long long token_id = load_i32_or_i64(token_ids_i32, token_ids_i64, token);
        const bool known = token_id >= 0 && token_id < vocab;
        Ints ids;
        Floats weights;
        fill(ids, sentinel);
        fill(weights, known ? weight : 0.0f);
        if (known) ids = *reinterpret_cast<const Ints*>(table + token_id * top_k + rank);
        *reinterpret_cast<Ints*>(ids_out + token * top_k + rank) = ids;
        *reinterpret_cast<Floats*>(weights_out + token * top_k + rank) = weights;
    }
}

// Does what `route` does for a call with serving inputs, one entry at a time. All threads of the
// CTA call it.
__device__ __forceinline__ void route_serving(const int* token_ids_i32,
                                              const long long* token_ids_i64, const int* table,
                                              long long first_token, unsigned cta_tokens, int vocab,
                                              unsigned top_k, const Serving& call) {
    const float weight = __fdiv_rn(1.0f, static_cast<float>(top_k));
    for (unsigned i = threadIdx.x; i < cta_tokens * top_k; i += THREADS) {
        const long long token = first_token + i / top_k;
        const unsigned rank = i % top_k;
        const long long token_id = load_i32_or_i64(token_ids_i32, token_ids_i64, token);
        const bool known = token_id >= 0 && token_id < vocab && !call.is_padding_token(token);
        call.store(token, top_k, rank, known ? weight : 0.0f,
                   known ? table[token_id * top_k + rank] : -1);
    }
}

// True if vectors of `width` entries divide a row of top_k entries and the three arrays are aligned
// for them.
__device__ __forceinline__ bool can_vectorize(unsigned width, unsigned top_k, const void* table,
                                              const void* weights_out, const void* ids_out) {
    const unsigned bytes = width * 4;
    return top_k % width == 0 && is_aligned(table, bytes) && is_aligned(weights_out, bytes) &&
           is_aligned(ids_out, bytes);
}

extern "C" __global__ void __launch_bounds__(THREADS)
hash_router(const int* token_ids_i32, const long long* token_ids_i64, const int* table, int vocab,
            int top_k, float* weights_out, int* ids_out, int tokens, int serving, int sentinel,
            int first_row, int replicas, const unsigned char* is_padding,
            const int* num_valid_tokens, const int* expert_map, const int* replica_counts,
            long long* ids_out_i64, int* logical_ids_out, long long* logical_ids_out_i64,
            int replica_start, int replica_step, int weights_stride, int ids_stride,
            int* packed_out, int* expert_load, int load_experts, const unsigned char* record_load,
            short* captured_ids_i16, int* captured_ids_i32, int captured_stride,
            int shared_experts, int shared_id, float shared_weight) {
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
    const long long first = static_cast<long long>(blockIdx.x) * TOKENS_PER_BLOCK;
    const unsigned count =
        static_cast<unsigned>(min(tokens - first, static_cast<long long>(TOKENS_PER_BLOCK)));
    const unsigned k = static_cast<unsigned>(top_k);
    if (serving != 0) {
        const Serving call = {serving,
                              sentinel,
                              first_row,
                              replicas,
                              is_padding,
                              num_valid_tokens,
                              nullptr,  // image_mask
                              expert_map,
                              replica_counts,
                              nullptr,  // given_ids_i32
                              nullptr,  // given_ids_i64
                              weights_out,
                              ids_out,
                              ids_out_i64,
                              logical_ids_out,
                              logical_ids_out_i64,
                              static_cast<unsigned>(replica_start),
                              static_cast<unsigned>(replica_step),
                              nullptr,  // given_mask
                              {weights_stride, ids_stride, packed_out, expert_load, load_experts,
                               record_load, captured_ids_i16, captured_ids_i32, captured_stride,
                               shared_experts, shared_id, shared_weight}};
        route_serving(token_ids_i32, token_ids_i64, table, first, count, vocab, k, call);
    } else if (can_vectorize(4, k, table, weights_out, ids_out)) {
        route<4>(token_ids_i32, token_ids_i64, table, weights_out, ids_out, first, count, vocab, k,
                 sentinel);
    } else if (can_vectorize(2, k, table, weights_out, ids_out)) {
        route<2>(token_ids_i32, token_ids_i64, table, weights_out, ids_out, first, count, vocab, k,
                 sentinel);
    } else {
        route<1>(token_ids_i32, token_ids_i64, table, weights_out, ids_out, first, count, vocab, k,
                 sentinel);
    }
}
