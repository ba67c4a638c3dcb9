// What CUDA C++ has no name for: a few instructions, an ordering, a test of alignment.
#pragma once

// Programmatic dependent launch. The wait returns when every grid that this one depends on has
// finished and its stores are visible; before it a kernel may touch only buffers that no launch
// writes. The launch of the next grid may be allowed at any point, since that grid waits in turn
// for all of this one: the kernels allow it first thing.
__device__ __forceinline__ void wait_for_previous_grids() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ void allow_next_grid() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Clusters. The arrival releases this thread's earlier stores, the wait acquires those of all
// threads of the cluster.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Stores to the same variable in the shared memory of the cluster's block number `block`.
__device__ __forceinline__ void store_to_block(unsigned long long* shared, unsigned block,
                                               unsigned long long value) {
    const unsigned here = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    unsigned there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(block));
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(there), "l"(value) : "memory");
}

// Computes the value here: the compiler may not move its computation down to where it is used.
__device__ __forceinline__ void compute_here(float& value) {
    asm volatile("" : "+f"(value));
}

// Brings the line to the second-level cache, and its page's address to the multiprocessor.
__device__ __forceinline__ void prefetch(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

__device__ __forceinline__ bool is_aligned(const void* pointer, unsigned bytes) {
    return reinterpret_cast<unsigned long long>(pointer) % bytes == 0;
}
