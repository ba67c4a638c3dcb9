// PTX instructions of topk_indices: other CTAs' shared memory, and scores that are read once.
#pragma once

#include "common/ptx.cuh"

// A word of the shared memory of the CTA of rank `cta_rank`, which has exchanged a cluster barrier
// since it wrote it.
__device__ __forceinline__ unsigned load_from_cluster_rank(const unsigned* shared,
                                                           unsigned cta_rank) {
    const unsigned own_address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    unsigned remote_address, value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(remote_address)
                 : "r"(own_address), "r"(cta_rank));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(remote_address) : "memory");
    return value;
}

// A barrier of all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
    __syncwarp();
    cluster_arrive();
    cluster_wait();
}

// 16 bytes at an aligned global address, which need no room in L1: they are not read again.
__device__ __forceinline__ uint4 load_once(const void* address) {
    uint4 loaded;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(loaded.x), "=r"(loaded.y), "=r"(loaded.z), "=r"(loaded.w)
                 : "l"(address)
                 : "memory");
    return loaded;
}

// The larger of two numbers, NaN if one is NaN.
__device__ __forceinline__ float max_or_nan(float a, float b) {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
}
