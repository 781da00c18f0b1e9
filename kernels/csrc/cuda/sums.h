// The sums of losses, by one block each: the total, and every task's.
//
// Owns: their order. Thread t takes losses t, t + threads, ... in fp64, lanes and then warps merge in a tree: the same
// bits for the same input, whatever else runs.
#pragma once

#include "../sett.h"
#include "device.h"
#include "fault.h"

namespace sett {
namespace cuda {

#ifndef SETT_SUM_THREADS
#define SETT_SUM_THREADS 256  // tests on a CPU have fewer
#endif

constexpr int kSumThreads = SETT_SUM_THREADS;
constexpr size_t kSumShared = sizeof(double) * kWarp;

// How many blocks of kSumThreads threads take part; `part` below is one of them.
inline int64_t sum_parts(const SumArgs& args) { return 1 + (args.tasks > 0 ? args.tasks : 0); }

// A term of weight 0 adds nothing, even where the loss is infinite.
template <typename Real> __device__ __forceinline__ double term(float weight, Real loss) {
  return weight == 0.0f ? 0.0 : double(weight) * double(loss);
}

template <typename Real> __device__ void sum_part(const SumArgs& args, int64_t part) {
  const Real* loss = static_cast<const Real*>(args.loss);
  const Real* more = static_cast<const Real*>(args.more);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < args.count; i += blockDim.x) {
    if (part > 0 && args.task[i] != part - 1) continue;
    sum += term(args.weight[i], loss[i]);
    if (more != nullptr) sum += term(args.more_weight[i], more[i]);
    if (part == 0 && args.tasks > 0 && (args.task[i] < 0 || args.task[i] >= args.tasks)) {
      report(args.fault, i, {FaultKind::task, args.task[i]});
    }
  }
  double* warps = reinterpret_cast<double*>(shared_memory());
  sum = warp_sum(sum);
  if (lane_index() == 0) warps[warp_index()] = sum;
  __syncthreads();
  if (warp_index() != 0) return;
  sum = warp_sum(lane_index() < warp_count() ? warps[lane_index()] : 0.0);
  if (lane_index() != 0) return;
  Real* to = static_cast<Real*>(part == 0 ? args.total : args.by_task);
  to[part == 0 ? 0 : part - 1] = static_cast<Real>(sum);
}

}  // namespace cuda
}  // namespace sett
