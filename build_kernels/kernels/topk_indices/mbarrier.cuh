// PTX instructions of topk_indices: asynchronous copies from global to shared memory, asynchronous stores
// to other CTAs' shared memory, and the barriers (mbarrier) that tell when they have arrived.
#pragma once

__device__ __forceinline__ unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Initializes `barrier`: each of its phases completes when expect_bytes has been called once and that many
// bytes have arrived. Called by one thread.
__device__ __forceinline__ void init_barrier(unsigned long long* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// Makes the barriers that this thread has initialized visible to copies and to the cluster's other CTAs.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Orders this thread's earlier stores to shared memory before copies to the same places that start
// behind a barrier.
__device__ __forceinline__ void fence_stores_before_copies() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives at `barrier`, whose phase then completes when `bytes` bytes have arrived. Called by one thread.
__device__ __forceinline__ void expect_bytes(unsigned long long* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

// Starts a copy, which completes a phase of `barrier`. Both addresses and `bytes` are multiples of
// 16. Called by one thread, after all threads have read what was there.
__device__ __forceinline__ void start_copy(void* shared, const void* global, unsigned bytes,
                                           unsigned long long* barrier) {
    expect_bytes(barrier, bytes);
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// Waits for a phase of `barrier`: `parity` is 0 for the first, 1 for the second and so on by turns.
__device__ __forceinline__ void wait_for_copy(unsigned long long* barrier, unsigned parity) {
    unsigned complete;
    do {
        asm volatile(
            "{\n"
            ".reg .pred complete;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
            "selp.u32 %0, 1, 0, complete;\n"
            "}"
            : "=r"(complete)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (complete == 0);
}

// Stores `value` to the shared memory of the CTA of rank `cta_rank`, at the place that `shared` has in
// this CTA, and counts its 4 bytes at `barrier` there. Called by any thread; that CTA must have
// initialized the barrier before a cluster barrier.
__device__ __forceinline__ void store_counted(unsigned* shared, unsigned cta_rank, unsigned value,
                                              unsigned long long* barrier) {
    const unsigned own_address = shared_address(shared);
    const unsigned own_barrier = shared_address(barrier);
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

// Waits for the first phase of `barrier`, behind which this thread sees what store_counted has stored.
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
            : "r"(shared_address(barrier))
            : "memory");
    } while (complete == 0);
}
