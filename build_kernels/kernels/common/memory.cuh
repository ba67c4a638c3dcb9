// Global memory: vectors of consecutive elements, and integers that are 32 or 64 bits wide.
#pragma once

// True if `address` is a multiple of `bytes`, which is what a load or store of that size needs.
__device__ __forceinline__ bool is_aligned(const void* address, unsigned bytes) {
    return reinterpret_cast<unsigned long long>(address) % bytes == 0;
}

// The types that one instruction loads or stores: WIDTH consecutive elements of 4 bytes.
template <unsigned WIDTH> struct Vector;
template <> struct Vector<1> { using Ints = int; using Floats = float; };
template <> struct Vector<2> { using Ints = int2; using Floats = float2; };
template <> struct Vector<4> { using Ints = int4; using Floats = float4; };

// Element `index` of an array that comes as 32-bit or as 64-bit integers: exactly one of the two
// pointers is not null.
__device__ __forceinline__ long long load_i32_or_i64(const int* array_i32,
                                                     const long long* array_i64,
                                                     long long index) {
    return array_i64 != nullptr ? array_i64[index] : array_i32[index];
}

// Stores an integer to the one of two arrays that is not null; to neither if both are null.
__device__ __forceinline__ void store_i32_or_i64(int* array_i32, long long* array_i64,
                                                 long long index, int value) {
    if (array_i64 != nullptr) {
        array_i64[index] = value;
    } else if (array_i32 != nullptr) {
        array_i32[index] = value;
    }
}
