// The optional inputs and outputs of a call. "Serving inputs": padding tokens, image tokens, given
// expert ids, expert replicas (load balancing), 64-bit ids, logical ids. "Options" (Options below):
// outputs with row strides or packed, recorded expert loads and ids, shared experts.
//
// common/parameters.py documents each parameter; Serving and Options have a field for each. A null
// pointer means that the call does not have that input. A kernel reads any of this only where its
// parameter `serving` is not 0, options only where it is WITH_OPTIONS, and only after the
// dependency wait.
//
// An expert of -1 means "no expert": its id is stored as the sentinel and it has no replicas. A
// padding token has no expert in any rank (step 7 of router_runtime/spec.py).
#pragma once

#include "common/memory.cuh"

// The value of a kernel's parameter `serving` with which it reads the options too.
constexpr int WITH_OPTIONS = 2;

// The 16 upper bits of the bfloat16 next to a finite number that is not negative, ties to even.
__device__ __forceinline__ unsigned bf16_bits(float value) {
    const unsigned bits = __float_as_uint(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// All functions are called by single threads.
struct Options {
    int weights_stride;  // elements from a row of the outputs to the next
    int ids_stride;
    int* packed_out;
    int* expert_load;
    int load_experts;
    const unsigned char* record_load;
    short* captured_ids_i16;
    int* captured_ids_i32;
    int captured_stride;
    int shared_experts;
    int shared_id;
    float shared_weight;

    // Stores weight and id of one column of a token's row, in the form that the call wants.
    __device__ __forceinline__ void store(float* weights_out, int* ids_out, long long* ids_out_i64,
                                          long long token, int column, float weight,
                                          int id) const {
        const long long element = token * ids_stride + column;
        if (packed_out != nullptr) {
            packed_out[element] = static_cast<int>(static_cast<unsigned>(id) << 16 |
                                                   bf16_bits(weight));
        } else {
            weights_out[token * weights_stride + column] = weight;
            store_i32_or_i64(ids_out, ids_out_i64, element, id);
        }
    }

    // Counts one expert of a token under its physical id. An id outside the counts is not counted.
    __device__ __forceinline__ void record(int physical) const {
        if (expert_load == nullptr || physical < 0 || physical >= load_experts) return;
        if (record_load == nullptr || *record_load != 0) atomicAdd(expert_load + physical, 1);
    }

    // Records the logical id of one rank of a token.
    __device__ __forceinline__ void capture(long long token, int rank, int logical) const {
        const long long element = token * captured_stride + rank;
        if (captured_ids_i16 != nullptr) captured_ids_i16[element] = static_cast<short>(logical);
        if (captured_ids_i32 != nullptr) captured_ids_i32[element] = logical;
    }
};

// All functions are called by single threads. `token` is a row of this launch.
struct Serving {
    int serving;
    int sentinel;
    int first_row;  // row t of this launch is row first_row + t of the batch
    int replicas;   // columns of expert_map
    const unsigned char* is_padding;
    const int* num_valid_tokens;
    const unsigned char* image_mask;
    const int* expert_map;
    const int* replica_counts;
    const int* given_ids_i32;
    const long long* given_ids_i64;
    float* weights_out;
    int* ids_out;
    long long* ids_out_i64;
    int* logical_ids_out;
    long long* logical_ids_out_i64;
    unsigned replica_start;
    unsigned replica_step;
    const unsigned char* given_mask;
    Options options;

    // True if the token is padding, by the mask or because it lies past the valid tokens.
    __device__ __forceinline__ bool is_padding_token(long long token) const {
        return (is_padding != nullptr && is_padding[token] != 0) ||
               (num_valid_tokens != nullptr && first_row + token >= *num_valid_tokens);
    }

    // True if the token is an image token, which the image bias selects for.
    __device__ __forceinline__ bool is_image_token(long long token) const {
        return image_mask != nullptr && image_mask[token] != 0;
    }

    // True if the call gives the token's experts, so that none are selected.
    __device__ __forceinline__ bool is_given_token(long long token) const {
        return (given_ids_i32 != nullptr || given_ids_i64 != nullptr) &&
               (given_mask == nullptr || given_mask[token] != 0);
    }

    // The given expert at an element of [tokens, top_k]; -1 for an id outside [0, experts).
    __device__ __forceinline__ int given_expert(long long element, unsigned experts) const {
        const long long id = load_i32_or_i64(given_ids_i32, given_ids_i64, element);
        return id >= 0 && id < experts ? static_cast<int>(id) : -1;
    }

    // Stores weight and expert of one rank of a token, and all else that the call wants of them.
    // With a map, the id is the physical one of a replica: that in place (start + step * row of
    // the batch), an unsigned number of 32 bits, modulo the number of replicas.
    __device__ __forceinline__ void store(long long token, unsigned top_k, unsigned rank,
                                          float weight, int expert) const {
        const long long element = token * top_k + rank;
        const int logical = expert < 0 ? sentinel : expert;
        int physical = logical;
        if (expert_map != nullptr && expert >= 0) {
            // The count is clamped, so that no content of replica_counts leads outside the map.
            const unsigned count = max(min(replica_counts[expert], replicas), 1);
            const unsigned row = first_row + static_cast<unsigned>(token);
            const unsigned replica = (replica_start + replica_step * row) % count;
            physical = expert_map[static_cast<long long>(expert) * replicas + replica];
        }
        store_i32_or_i64(logical_ids_out, logical_ids_out_i64, element, logical);
        if (serving != WITH_OPTIONS) {
            weights_out[element] = weight;
            store_i32_or_i64(ids_out, ids_out_i64, element, physical);
            return;
        }
        options.store(weights_out, ids_out, ids_out_i64, token, rank, weight, physical);
        if (expert >= 0) options.record(physical);
        options.capture(token, rank, logical);
        if (static_cast<int>(rank) < options.shared_experts) {
            const bool padding = is_padding_token(token);
            options.store(weights_out, ids_out, ids_out_i64, token, top_k + rank,
                          padding ? 0.0f : options.shared_weight,
                          padding ? sentinel : options.shared_id + static_cast<int>(rank));
        }
    }
};
