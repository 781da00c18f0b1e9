// CUDA on a CPU, as much of it as Sett's kernels use: for tests without a GPU, never for anything else.
//
// Every thread of a cluster is a real thread with real barriers between them, so that ThreadSanitizer sees a missing
// one. Two clusters of a grid run at a time, so that it sees two blocks that write the same bytes. Shared memory has
// exactly the requested size and begins as garbage, for AddressSanitizer. What this cannot show: a shuffle here also
// orders memory within the warp, and cluster_wait orders all that came before it, not just what came before the arrive.
#pragma once

#include <math.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned n = 1) : x(n) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace shim {

inline int capability_major = 9;
inline std::vector<cudaLaunchConfig_t> launches;  // what was launched, for a test to look at
constexpr unsigned kLanes = 32, kClustersAtATime = 2;

// Yields rather than sleeps: hundreds of threads share a few cores.
class Barrier {
 public:
  explicit Barrier(unsigned count) : count_(count) {}
  void wait() {
    const unsigned phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    while (phase_.load(std::memory_order_acquire) == phase) sched_yield();
  }

 private:
  const unsigned count_;
  std::atomic<unsigned> arrived_{0}, phase_{0};
};

struct Warp {
  Barrier barrier{kLanes};
  unsigned char places[2][kLanes][8];  // two sets in turn: one barrier is enough for an exchange
};

struct Block {
  explicit Block(unsigned threads, size_t shared) : barrier(threads), memory(new unsigned char[shared]), bytes(shared) {
    for (unsigned i = 0; i < threads / kLanes; ++i) warps.emplace_back(new Warp);
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::unique_ptr<unsigned char[]> memory;
  size_t bytes;
};

struct Cluster {
  explicit Cluster(unsigned count, unsigned threads, size_t shared) : barrier(count * threads) {
    for (unsigned i = 0; i < count; ++i) blocks.emplace_back(new Block(threads, shared));
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Place {
  Cluster* cluster;
  Block* block;
  Warp* warp;
  unsigned lane, rank, turn;
};
inline thread_local Place here;

struct Index {
  unsigned x, y, z;
};

// What every lane of the warp gives, to all of them.
template <typename T> void exchange(T mine, T (&all)[kLanes]) {
  static_assert(sizeof(T) <= 8, "a lane's place has 8 bytes");
  auto& places = here.warp->places[here.turn ^= 1];
  memcpy(places[here.lane], &mine, sizeof(T));
  here.warp->barrier.wait();
  for (unsigned i = 0; i < kLanes; ++i) memcpy(&all[i], places[i], sizeof(T));
}

}  // namespace shim

inline thread_local shim::Index threadIdx, blockIdx, blockDim, gridDim;

inline unsigned char* shared_memory() { return shim::here.block->memory.get(); }
inline void __syncthreads() { shim::here.block->barrier.wait(); }
inline void __syncwarp(unsigned) { shim::here.warp->barrier.wait(); }
inline void __threadfence() {}  // the atomics below order memory
template <typename T> T __shfl_xor_sync(unsigned, T x, int step) {
  T all[shim::kLanes];
  shim::exchange(x, all);
  return all[shim::here.lane ^ static_cast<unsigned>(step)];
}
inline unsigned __ballot_sync(unsigned, bool x) {
  bool all[shim::kLanes];
  shim::exchange(x, all);
  unsigned bits = 0;
  for (unsigned i = 0; i < shim::kLanes; ++i) bits |= unsigned(all[i]) << i;
  return bits;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int atomicCAS(int* p, int expected, int desired) {
  __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  if (expected != 0) sched_yield();
  return expected;
}
inline int atomicExch(int* p, int x) { return __atomic_exchange_n(p, x, __ATOMIC_ACQ_REL); }

template <typename To, typename From> To shim_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}
inline float __uint_as_float(unsigned x) { return shim_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return shim_bits<unsigned>(x); }
inline double __hiloint2double(int hi, int lo) {
  return shim_bits<double>(uint64_t(unsigned(hi)) << 32 | unsigned(lo));
}
inline int __double2hiint(double x) { return int(shim_bits<uint64_t>(x) >> 32); }
inline int __double2loint(double x) { return int(unsigned(shim_bits<uint64_t>(x))); }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = shim::capability_major;
  return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidValue";
}

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual... args) {
  const unsigned size = config->numAttrs == 0 ? 1 : config->attrs[0].val.clusterDim.x;
  const unsigned threads = config->blockDim.x, grid = config->gridDim.x;
  if (grid == 0 || grid % size != 0 || threads % shim::kLanes != 0 || threads > 1024 || size > 8) {
    return cudaErrorInvalidValue;
  }
  shim::launches.push_back(*config);
  std::vector<std::thread> all;
  std::vector<std::unique_ptr<shim::Cluster>> clusters;
  const unsigned at_a_time = std::min(shim::kClustersAtATime, grid / size);
  for (unsigned c = 0; c < at_a_time; ++c) {
    clusters.emplace_back(new shim::Cluster(size, threads, config->dynamicSmemBytes));
    shim::Cluster* cluster = clusters.back().get();
    for (unsigned t = 0; t < size * threads; ++t) {
      all.emplace_back([=] {
        const unsigned rank = t / threads, thread = t % threads;
        shim::Block* block = cluster->blocks[rank].get();
        shim::here = {cluster, block, block->warps[thread / shim::kLanes].get(), thread % shim::kLanes, rank, 0};
        threadIdx = {thread, 0, 0};
        blockDim = {threads, 1, 1};
        gridDim = {grid, 1, 1};
        for (unsigned first = c * size; first < grid; first += at_a_time * size) {
          blockIdx = {first + rank, 0, 0};
          if (thread == 0) memset(block->memory.get(), 0xcd, block->bytes);
          cluster->barrier.wait();
          kernel(args...);
          cluster->barrier.wait();
        }
      });
    }
  }
  for (std::thread& thread : all) thread.join();
  return cudaSuccess;
}
