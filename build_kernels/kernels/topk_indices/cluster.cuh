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

// Arrives at the cluster's barrier and releases nothing: for a barrier that only keeps CTAs alive until
// the others have read from them. This thread has used all that it has read: a load whose value nothing
// waited for may still be on its way when the other CTA exits, which is an error. cluster_arrive waits
// for such loads. Called like it.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// Stores `value` to the shared memory of the CTA of rank `cta_rank`, at the place that `shared` has in
// this CTA, and counts its 4 bytes at `barrier` there. Called by any thread; that CTA must have
// initialized the barrier before a cluster barrier.
__device__ __forceinline__ void store_counted(unsigned* shared, unsigned cta_rank, unsigned value,
                                              unsigned long long* barrier) {
    const unsigned own_address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    const unsigned own_barrier = static_cast<unsigned>(__cvta_generic_to_shared(barrier));
    asm volatile(
        "{\n"
        ".reg .u32 address, barrier;\n"
        "mapa.shared::cluster.u32 address, %0, %2;\n"
        "mapa.shared::cluster.u32 barrier, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [address], %3, [barrier];\n"
        "}" ::"r"(own_address),
        "r"(own_barrier), "r"(cta_rank), "r"(value)
        : "memory");
}

// Tells how many bytes of such stores complete the first phase of `barrier`. Called by one thread.
__device__ __forceinline__ void expect_bytes(unsigned long long* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(barrier))),
                 "r"(bytes)
                 : "memory");
}

// Waits for the first phase of `barrier`, behind which this thread sees what was stored.
__device__ __forceinline__ void wait_for_stores(unsigned long long* barrier) {
    unsigned complete;
    do {
        asm volatile(
            "{\n"
            ".reg .pred complete;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%1], 0;\n"
            "selp.u32 %0, 1, 0, complete;\n"
            "}"
            : "=r"(complete)
            : "r"(static_cast<unsigned>(__cvta_generic_to_shared(barrier)))
            : "memory");
    } while (complete == 0);
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
