// The optional inputs and outputs of a call, "serving inputs": padding tokens, image tokens, given
// expert ids, expert replicas (load balancing), 64-bit ids, logical ids.
//
// common/parameters.py documents each parameter; Serving has a field for each. A null pointer means
// that the call does not have that input. A kernel reads any of this only where its parameter
// `serving` is not 0, and only after the dependency wait.
//
// An expert of -1 means "no expert": its id is stored as the sentinel and it has no replicas. A
// padding token has no expert in any rank (step 7 of router_runtime/spec.py).
#pragma once

#include "common/memory.cuh"

// All functions are called by single threads. `token` is a row of this launch; `output` is an
// element of [tokens, top_k], token * top_k + rank.
struct Serving {
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
    int* ids_out;
    long long* ids_out_i64;
    int* logical_ids_out;
    long long* logical_ids_out_i64;

    // True if the token is padding, by the mask or because it lies past the valid tokens.
    __device__ __forceinline__ bool is_padding_token(long long token) const {
        return (is_padding != nullptr && is_padding[token] != 0) ||
               (num_valid_tokens != nullptr && first_row + token >= *num_valid_tokens);
    }

    // True if the token is an image token, which the image bias selects for.
    __device__ __forceinline__ bool is_image_token(long long token) const {
        return image_mask != nullptr && image_mask[token] != 0;
    }

    // True if the call gives the expert ids, so that nothing is selected.
    __device__ __forceinline__ bool has_given_ids() const {
        return given_ids_i32 != nullptr || given_ids_i64 != nullptr;
    }

    // The given expert of an output element; -1 for an id outside [0, experts).
    __device__ __forceinline__ int given_expert(long long output, unsigned experts) const {
        const long long id = load_i32_or_i64(given_ids_i32, given_ids_i64, output);
        return id >= 0 && id < experts ? static_cast<int>(id) : -1;
    }

    // Stores the physical id of an expert, and its logical id where the call wants it. With a map,
    // the physical id is that of a replica: map[expert][row of the batch % replica count].
    __device__ __forceinline__ void store_expert(long long token, long long output,
                                                 int expert) const {
        const int logical = expert < 0 ? sentinel : expert;
        int physical = logical;
        if (expert_map != nullptr && expert >= 0) {
            // The count is clamped, so that no content of replica_counts leads outside the map.
            const int count = max(min(replica_counts[expert], replicas), 1);
            const long long replica = (first_row + token) % count;
            physical = expert_map[static_cast<long long>(expert) * replicas + replica];
        }
        store_i32_or_i64(ids_out, ids_out_i64, output, physical);
        store_i32_or_i64(logical_ids_out, logical_ids_out_i64, output, logical);
    }
};
