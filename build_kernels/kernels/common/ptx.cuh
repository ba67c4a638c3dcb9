// PTX instructions and compiler barriers that CUDA C++ has no function for.
//
// Programmatic dependent launch, the same in every kernel of this folder:
//
//   1. griddepcontrol_launch_dependents() comes first. From then on the GPU may start CTAs of the
//      next grid beside this one. That is safe this early, because the next grid has its own wait.
//   2. Before griddepcontrol_wait() a kernel may prefetch or read only buffers that no launch
//      writes (weight, bias, table) and stores nothing to global memory. This part overlaps with
//      the end of the previous grid.
//   3. griddepcontrol_wait(), executed by every CTA on every path, returns when all prerequisite
//      grids have finished and their stores are visible. All other loads and stores come after it.
//
// No kernel parameter is __restrict__. It would let the compiler turn loads into ld.global.nc, and
// the non-coherent cache may not be used for data that the previous grid was still writing when
// this one started.
#pragma once

// Waits for all prerequisite grids: step 3 above. Called by all threads.
__device__ __forceinline__ void griddepcontrol_wait() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Lets the next grid start: step 1 above. It starts when every CTA of this grid has called this or
// has exited, and there is room for it.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Arrives at the cluster's barrier and releases this thread's earlier stores. Called by all threads
// of the cluster, each warp converged; a cluster_wait must follow before the next arrival.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// Waits until all threads of the cluster have arrived and acquires what they released. Called by
// all threads of the cluster, each warp converged.
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Stores `value` to the shared memory of another CTA of the cluster, the one of rank `cta_rank`, at
// the place that `shared` has in this CTA. Called by any thread. That CTA must have started (so a
// cluster barrier must have completed before) and reads the value after a cluster barrier that follows.
__device__ __forceinline__ void store_to_cluster_rank(unsigned long long* shared,
                                                      unsigned cta_rank,
                                                      unsigned long long value) {
    const unsigned own_address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    unsigned remote_address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(remote_address)
                 : "r"(own_address), "r"(cta_rank));
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(remote_address), "l"(value) : "memory");
}

// Makes the compiler compute `value` before this point: it may not sink the computation down to
// where the value is used. Emits no instruction.
__device__ __forceinline__ void prevent_sinking(float& value) {
    asm volatile("" : "+f"(value));
}

// Fetches the cache line of a global address into L2. It also brings the address translation of its
// page to the multiprocessor. Called by any thread.
__device__ __forceinline__ void prefetch_l2(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}
