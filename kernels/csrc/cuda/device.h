// What the kernels ask of the machine: shared memory, lanes of a warp, barriers, clusters, launches.
//
// Owns: every use of a feature that a test without a GPU has to imitate (tests/kernels/cuda_shim), and the rule that
// clusters exist from compute capability 9.0 on. Below that a cluster is one block.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <algorithm>

namespace sett {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ __forceinline__ int warp_count() { return static_cast<int>(blockDim.x) / kWarp; }

#if defined(__CUDACC__)
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}
#else
using ::shared_memory;
#endif

// Has the 16 bytes at `p` brought to L2, and does not wait.
__device__ __forceinline__ void prefetch(const void* p) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" : : "l"(p));
#else
  static_cast<void>(p);
#endif
}

// Butterflies: every lane ends with the same bits, since a + b == b + a.
template <typename T> __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
// fmax leaves NaN out, whichever side it is on; a NaN score shows in the sums.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
template <typename T> __device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = larger(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_rank() {
  return static_cast<int>(cooperative_groups::this_cluster().block_rank());
}
__device__ __forceinline__ int cluster_blocks() {
  return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
}
__device__ __forceinline__ void cluster_arrive() { cooperative_groups::cluster_group::barrier_arrive(); }
__device__ __forceinline__ void cluster_wait() { cooperative_groups::cluster_group::barrier_wait(); }
// The same place in the shared memory of block `rank` of the cluster.
template <typename T> __device__ __forceinline__ T* in_block(T* place, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(place, static_cast<unsigned>(rank));
}
#else
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ int cluster_blocks() { return 1; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() { __syncthreads(); }
template <typename T> __device__ __forceinline__ T* in_block(T* place, int) { return place; }
#endif

// `blocks` is a multiple of `cluster`; none is a launch of nothing, which CUDA would call an error.
template <typename... Expected, typename... Actual>
int launch(void (*kernel)(Expected...), int64_t blocks, int cluster, int threads, size_t shared, void* stream,
           Actual... args) {
  if (blocks == 0) return cudaSuccess;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace cuda
}  // namespace sett
