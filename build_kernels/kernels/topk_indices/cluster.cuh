// PTX instructions of topk_indices: the cluster's barrier, other CTAs' shared memory, and scores that are
// read once.
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

// Arrives at the cluster's barrier and releases nothing: for a barrier that only keeps CTAs alive until
// the others have read from them. This thread has used all that it has read: a load whose value nothing
// waited for may still be on its way when the other CTA exits, which is an error. cluster_arrive waits
// for such loads. Called like it.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// Arrives at the cluster's barrier and releases this thread's earlier stores to the shared memory of its
// own CTA, and no others: a release of all stores (cluster_arrive) waits until L2 has answered, longer
// than all else that a barrier does. Called by all threads.
__device__ __forceinline__ void cluster_arrive_shared() {
    __syncwarp();
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
    cluster_arrive_relaxed();
}

// A barrier of all threads of the cluster, behind which each of them sees what the others have stored
// to the shared memory of their own CTAs.
__device__ __forceinline__ void cluster_sync() {
    cluster_arrive_shared();
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
