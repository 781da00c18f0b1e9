// A team of threads that shares one segment: a warp, a block, or a cluster of blocks.
//
// Owns: how the accumulators of row_algebra.h are merged over a team, always in the same order, so that results repeat
// bit for bit. Lanes merge by shuffles, warps through shared memory, blocks through distributed shared memory.
#pragma once

#include "../row_algebra.h"
#include "device.h"

namespace sett {
namespace cuda {

constexpr int kMaxWarps = 32;
constexpr int kMaxCluster = 8;

enum class Level : int { warp, block, cluster };

// All of it is the same for the threads of a team but `thread`.
struct Team {
  Level level;
  int thread;  // of this one in the team
  int size;    // threads of the team
};

// Consecutive warps of a cluster's team are in different blocks: where a segment leaves some without work, every block
// has its share of them.
__device__ __forceinline__ Team make_team(Level level) {
  if (level == Level::warp) return {level, lane_index(), kWarp};
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (level == Level::block) return {level, thread, threads};
  const int blocks = cluster_blocks();
  return {level, (warp_index() * blocks + cluster_rank()) * kWarp + lane_index(), blocks * threads};
}

// What a team has summed up: a softmax, a divergence with the softmax's `linear` beside it, or a plain sum.
template <typename T> struct PairState {
  algebra::DivergenceState<T> divergence;
  T linear;
};

__device__ __forceinline__ float no_state(const float*) { return 0.0f; }
__device__ __forceinline__ double no_state(const double*) { return 0.0; }
template <typename T> __device__ __forceinline__ algebra::SoftmaxState<T> no_state(const algebra::SoftmaxState<T>*) {
  return algebra::softmax_start<T>();
}
template <typename T> __device__ __forceinline__ PairState<T> no_state(const PairState<T>*) {
  return {algebra::divergence_start<T>(), T(0)};
}

// Bring an accumulator to a common top first: then the lanes' sums just add.
template <typename T>
__device__ __forceinline__ algebra::SoftmaxState<T> raise(const algebra::SoftmaxState<T>& s, T top) {
  return algebra::softmax_merge<T>(s, {top, T(0), T(0)});
}
template <typename T>
__device__ __forceinline__ algebra::DivergenceState<T> raise(const algebra::DivergenceState<T>& s, T top_x, T top_y) {
  return algebra::divergence_merge<T>(s, {top_x, T(0), top_y, T(0), T(0), T(0), T(0), T(0)});
}

__device__ __forceinline__ float merge_lanes(float s) { return warp_sum(s); }
__device__ __forceinline__ double merge_lanes(double s) { return warp_sum(s); }
template <typename T> __device__ __forceinline__ algebra::SoftmaxState<T> merge_lanes(algebra::SoftmaxState<T> s) {
  s = raise(s, warp_max(s.top));
  s.rest = warp_sum(s.rest);
  s.linear = warp_sum(s.linear);
  return s;
}
template <typename T> __device__ __forceinline__ PairState<T> merge_lanes(PairState<T> s) {
  algebra::DivergenceState<T>& d = s.divergence;
  d = raise(d, warp_max(d.top_x), warp_max(d.top_y));
  d.sum_x = warp_sum(d.sum_x);
  d.sum_y = warp_sum(d.sum_y);
  d.lift = warp_sum(d.lift);
  d.mean_x = warp_sum(d.mean_x);
  d.mean_y = warp_sum(d.mean_y);
  d.spread = warp_max(d.spread);
  s.linear = warp_sum(s.linear);
  return s;
}

// A word that all lanes of a warp know, kept in shared memory. While a segment is walked, registers are full of scores:
// what has no room there the compiler would put aside in local memory.
template <typename T> __device__ __forceinline__ void park(volatile T* place, T value) {
  __syncwarp(kAllLanes);  // all have read what was there
  if (lane_index() == 0) *place = value;
  __syncwarp(kAllLanes);
}

// The shared memory behind the merges. There are two sets of places, used in turn: who writes a set for the merge after
// next has passed the barrier of the next one, which every thread reaches only when it has read the set.
template <size_t kPlace> struct Exchange {
  static constexpr size_t kPlaces = kPlace * 2 * (kMaxWarps + kMaxCluster);
  static constexpr size_t kBytes = kPlaces + sizeof(int) * kMaxWarps;

  // Every thread of the cluster begins and ends with these; the start of the others is waited for when it matters.
  __device__ __forceinline__ Exchange() {
    park(flags(), 0);
    cluster_arrive();
  }
  __device__ __forceinline__ void join() {
    const int now = *flags();
    if ((now & kJoined) != 0) return;
    cluster_wait();
    park(flags(), now | kJoined);
  }

  template <typename State> __device__ __forceinline__ State* among_warps() {
    return reinterpret_cast<State*>(shared_memory() + kPlace * static_cast<size_t>(next(kBlockTurn) * kMaxWarps));
  }
  template <typename State> __device__ __forceinline__ State* among_blocks() {
    const size_t places = static_cast<size_t>(2 * kMaxWarps + next(kClusterTurn) * kMaxCluster);
    return reinterpret_cast<State*>(shared_memory() + kPlace * places);
  }

 private:
  // Of the merges among warps so far, and of those among blocks, the last bit; whether every block of the cluster is
  // known to run: only then may its shared memory be written. Parked by each warp for itself.
  static constexpr int kBlockTurn = 1, kClusterTurn = 2, kJoined = 4;
  static __device__ __forceinline__ volatile int* flags() {
    return reinterpret_cast<volatile int*>(shared_memory() + kPlaces) + warp_index();
  }
  static __device__ __forceinline__ int next(int turn) {
    const int now = *flags() ^ turn;
    park(flags(), now);
    return (now & turn) != 0 ? 1 : 0;
  }
};

// The merge of all the team's states, in every thread. What any of them read from global memory before, others may
// overwrite after.
template <typename State, size_t kPlace>
__device__ __forceinline__ State merge_team(const Team& team, Exchange<kPlace>& exchange, State s) {
  const int lane = lane_index();
  s = merge_lanes(s);
  if (team.level == Level::warp) {
    __syncwarp(kAllLanes);
    return s;
  }
  State* warps = exchange.template among_warps<State>();
  if (lane == 0) warps[warp_index()] = s;
  __syncthreads();
  s = merge_lanes(lane < warp_count() ? warps[lane] : no_state(&s));
  if (team.level == Level::block) return s;
  State* blocks = exchange.template among_blocks<State>();
  exchange.join();
  if (warp_index() == 0 && lane < cluster_blocks()) *in_block(blocks + cluster_rank(), lane) = s;
  cluster_arrive();
  cluster_wait();
  return merge_lanes(lane < cluster_blocks() ? blocks[lane] : no_state(&s));
}

}  // namespace cuda
}  // namespace sett
