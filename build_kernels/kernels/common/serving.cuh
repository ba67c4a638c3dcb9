// What serving adds to a call: padding tokens, image tokens, given experts, replicas of experts,
// 64-bit ids. parameters.py says what each is; a null pointer is an input that the call does not
// have.
//
// An expert of -1 is none: the sentinel is stored for it, and it is never mapped.
#pragma once

struct Serving {
    int sentinel;
    int first_row;  // row t of the launch is row first_row + t of the batch
    int replicas;
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

    __device__ __forceinline__ bool pads(long long token) const {
        return (is_padding != nullptr && is_padding[token] != 0) ||
               (num_valid_tokens != nullptr && first_row + token >= *num_valid_tokens);
    }

    __device__ __forceinline__ bool shows(long long token) const {
        return image_mask != nullptr && image_mask[token] != 0;
    }

    __device__ __forceinline__ bool replays() const {
        return given_ids_i32 != nullptr || given_ids_i64 != nullptr;
    }

    // The given expert at that place of [tokens, top_k]; -1 for one outside [0, experts).
    __device__ __forceinline__ int given(long long place, unsigned experts) const {
        const long long id =
            given_ids_i64 != nullptr ? given_ids_i64[place] : given_ids_i32[place];
        return id >= 0 && id < experts ? static_cast<int>(id) : -1;
    }

    __device__ __forceinline__ void store_id(long long token, long long place, int expert) const {
        const int logical = expert < 0 ? sentinel : expert;
        int physical = logical;
        if (expert_map != nullptr && expert >= 0) {
            // Clamped, so that no content of the map can lead outside it.
            const int count = max(min(replica_counts[expert], replicas), 1);
            const long long replica = (first_row + token) % count;
            physical = expert_map[static_cast<long long>(expert) * replicas + replica];
        }
        put(ids_out, ids_out_i64, place, physical);
        put(logical_ids_out, logical_ids_out_i64, place, logical);
    }

    __device__ __forceinline__ static void put(int* narrow, long long* wide, long long place,
                                               int id) {
        if (wide != nullptr) {
            wide[place] = id;
        } else if (narrow != nullptr) {
            narrow[place] = id;
        }
    }
};
