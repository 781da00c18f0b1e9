// segment_losses_cuda: cross-entropy, J = KL(p || q) + KL(q || p), or both, of ragged segments, with gradients.
//
// Owns: which segments a block or cluster takes, in what team, and how a launch is shaped; segment_walk.h is the rest.
#include "segment_walk.h"

namespace sett {
namespace cuda {
namespace {

// A cluster takes `stride` consecutive segments: first the short ones, a warp each, then one after another the longer
// ones, by one block in turn or by all of them. Every thread of a team agrees on the segment's level, which depends on
// offsets alone.
template <typename S, Mode kMode>
__global__ void __launch_bounds__(most_threads<S, kMode>(), 1)
    segment_kernel(const SegmentArgs args, const int stride) {
  using K = Kernel<S, kMode>;
  using Real = typename K::Real;
  typename K::Shared exchange;
  park(&K::place()->blocks, cluster_blocks());
  park(&K::place()->rank, cluster_rank());
  park(&K::place()->rounds, (stride + cluster_blocks() * warp_count() - 1) / (cluster_blocks() * warp_count()));
  park(&K::place()->step, 0);
  while (true) {
    const int step = K::place()->step, rounds = K::place()->rounds;
    if (step >= rounds + stride) break;
    park(&K::place()->step, step + 1);
    const int blocks = K::place()->blocks, rank = K::place()->rank;
    const int i = step < rounds ? (step * blocks + rank) * warp_count() + warp_index() : step - rounds;
    const int64_t g = int64_t(blockIdx.x / blocks) * stride + i;
    if (i >= stride || g >= args.segments) continue;
    // All loads before the first branch on one of them.
    const int64_t begin = args.offsets[g], end = args.offsets[g + 1], target = K::kEntropy ? args.target[g] : kIgnore;
    const bool bounded = begin >= 0 && begin <= end && end <= args.elements && (g > 0 || begin == 0) &&
                         (g + 1 < args.segments || end == args.elements);
    const int64_t length = bounded ? end - begin : 0;
    const int64_t warp_reach = int64_t(kWarp) * K::kHeld * K::kWidth;
    const bool in_block = blocks == 1 || length <= warp_reach * warp_count();
    const Level level = length <= warp_reach ? Level::warp : in_block ? Level::block : Level::cluster;
    if ((level == Level::warp) != (step < rounds) || (level == Level::block && i % blocks != rank)) continue;
    const Team team = make_team(level);
    const Finding finding = bounded ? K::check(target, length) : Finding{FaultKind::offsets, end};
    if (finding.kind != FaultKind::none) {
      K::leave_out(args, team, g, begin, length, Real(NAN));
      if (team.thread == 0) report(args.fault, g, finding);
    } else if (length == 0 || (!K::kDivergence && target == kIgnore)) {
      K::leave_out(args, team, g, begin, length, Real(0));
    } else {
      park(&K::place()->segment, g);
      K::run(args, team, exchange);
    }
  }
  exchange.join();
}

constexpr int64_t kFewestGroups = 256;

struct Shape {
  int threads;
  int cluster;
};

// The smallest team whose registers hold so many vectors. More, smaller blocks overlap better than fewer large ones.
Shape smallest_shape(int64_t vectors, int held, int most, bool clusters) {
  const int small = std::max(kThreads / 2, kWarp);
  const Shape with_clusters[] = {{small, 1}, {kThreads, 1}, {kThreads, 2}, {kThreads, 4}, {kThreads, kMaxCluster}};
  const Shape without[] = {{small, 1}, {kThreads, 1}, {most, 1}};
  const Shape* shape = clusters ? with_clusters : without;
  const Shape* last = clusters ? with_clusters + 4 : without + 2;
  while (shape != last && int64_t(shape->threads) * shape->cluster * held < vectors) ++shape;
  return *shape;
}

template <typename S, Mode kMode> int launch_segments(const SegmentArgs& args, void* stream) {
  using K = Kernel<S, kMode>;
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  const Shape shape = smallest_shape(args.longest / K::kWidth, K::kHeld, most_threads<S, kMode>(), major >= 9);
  // Where most segments are as long as the longest, one at a time. Of a mixture as many as there are warps for the
  // short ones, unless that leaves too few clusters to fill a device. A grid has less than 2^31 blocks.
  const int warps = shape.threads / kWarp * shape.cluster;
  const bool even = args.elements / args.segments > args.longest / 4;
  const bool short_ones = args.longest <= int64_t(kWarp) * K::kHeld * K::kWidth;
  const int64_t mixed = std::min<int64_t>(warps, std::max<int64_t>(args.segments / kFewestGroups, 1));
  const int64_t stride = std::max<int64_t>(short_ones ? warps : even ? 1 : mixed, (args.segments >> 27) + 1);
  const int64_t groups = (args.segments + stride - 1) / stride;
  return launch(segment_kernel<S, kMode>, groups * shape.cluster, shape.cluster, shape.threads, K::kShared, stream, args,
                static_cast<int>(stride));
}

}  // namespace
}  // namespace cuda

int segment_losses_cuda(const SegmentArgs& args, void* stream) {
  using cuda::Mode;
  if (args.segments == 0) return cudaSuccess;
  return cuda::with_format(args.storage, [&](auto s) {
    using S = decltype(s);
    if (args.y == nullptr) return cuda::launch_segments<S, Mode::entropy>(args, stream);
    if (args.target == nullptr) return cuda::launch_segments<S, Mode::divergence>(args, stream);
    return cuda::launch_segments<S, Mode::both>(args, stream);
  });
}

}  // namespace sett
