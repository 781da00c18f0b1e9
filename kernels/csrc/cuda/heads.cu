// head_losses_cuda: all small heads in one launch, and their gradients and sums in a second.
//
// Owns: two kernels. `score_kernel` has a block for each segment and point: dot products, losses, and the gradients of
// scores. `gather_kernel` has a block for each output: a tile of a row of grad_weight or grad_features, or a sum. Such
// a block looks through all segments for those that use its row, in their order, so that nothing need be sorted or
// inverted beforehand and no two blocks add to the same place: the same bits every time.
#include "../sett.h"
#include "device.h"
#include "fault.h"
#include "format.h"
#include "sums.h"
#include "team.h"

namespace sett {
namespace cuda {
namespace {

// A multiprocessor has room for 8 blocks: 132 of them take a batch of 512 rows, or 1000 outputs, at once.
constexpr int kThreads = kSumThreads;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTogether = 4;  // rows a warp multiplies at a time, to have that many loads on their way

// One segment or point: `count` consecutive rows of one matrix against one row of the other.
struct Use {
  int64_t feature, features, row, rows;
  int64_t score;  // its first score
  int64_t length;

  // Unsigned, where the fields may be anything: no overflow, and one comparison.
  __device__ __forceinline__ bool has_feature(int64_t i) const {
    return uint64_t(i) - uint64_t(feature) < uint64_t(features);
  }
  __device__ __forceinline__ bool has_row(int64_t i) const { return uint64_t(i) - uint64_t(row) < uint64_t(rows); }
};

// Item i: a segment, or behind all of them a point.
__device__ __forceinline__ Use read_use(const HeadArgs& args, int64_t i) {
  if (i < args.segments) {
    const int64_t* s = args.segment + 4 * i;
    const int64_t begin = args.offsets[i], end = args.offsets[i + 1];
    return {s[0], s[1], s[2], s[3], begin, int64_t(uint64_t(end) - uint64_t(begin))};
  }
  const int64_t n = i - args.segments;
  return {args.point[2 * n], 1, args.point[2 * n + 1], 1, args.scores_count + n, 1};
}

// The offsets come first: unless they are good, not even the scores of the segment may be written.
__device__ __forceinline__ bool has_good_offsets(const HeadArgs& args, int64_t i, const Use& use) {
  if (i >= args.segments) return true;
  const int64_t end = args.offsets[i + 1];
  return use.score >= 0 && use.score <= end && end <= args.scores_count && (i > 0 || use.score == 0) &&
         (i + 1 < args.segments || end == args.scores_count);
}

__device__ __forceinline__ Finding check_use(const HeadArgs& args, int64_t i, const Use& use) {
  if (!has_good_offsets(args, i, use)) return {FaultKind::offsets, args.offsets[i + 1]};
  const bool one_feature = use.features == 1 && use.rows == use.length;
  const bool one_row = use.rows == 1 && use.features == use.length;
  if (!one_feature && !one_row) return {FaultKind::shape, use.length};
  if (use.feature < 0 || use.feature > args.feature_count - use.features) return {FaultKind::feature, use.feature};
  if (use.row < 0 || use.row > args.row_count - use.rows) return {FaultKind::row, use.row};
  if (i >= args.segments || args.target[i] == kIgnore) return {FaultKind::none, 0};
  const int64_t target = args.target[i];
  if (use.length == 0) return {FaultKind::empty, target};
  if (target < 0 || target >= use.length) return {FaultKind::target, target};
  return {FaultKind::none, 0};
}

// Dot products of `fixed` with up to kTogether rows behind `moving`, of one warp, in every lane.
template <typename S, typename Real = typename Format<S>::Real>
__device__ __forceinline__ void dot(const S* fixed, const S* moving, int64_t hidden, int rows, bool aligned,
                                    Real (&sums)[kTogether]) {
  using F = Format<S>;
#pragma unroll
  for (int r = 0; r < kTogether; ++r) sums[r] = Real(0);
  if (aligned) {
    const int64_t vectors = hidden / F::kWidth;
    for (int64_t k = lane_index(); k < vectors; k += kWarp) {
      const uint4 a = reinterpret_cast<const uint4*>(fixed)[k];
      uint4 b[kTogether];
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        b[r] = reinterpret_cast<const uint4*>(moving + (r < rows ? r : 0) * hidden)[k];
      }
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
#pragma unroll
        for (int j = 0; j < F::kWidth; ++j) sums[r] += F::get(a, j) * F::get(b[r], j);
      }
    }
  } else {
    for (int64_t k = lane_index(); k < hidden; k += kWarp) {
      const Real a = F::real(fixed[k]);
#pragma unroll
      for (int r = 0; r < kTogether; ++r) sums[r] += a * F::real(moving[(r < rows ? r : 0) * hidden + k]);
    }
  }
#pragma unroll
  for (int r = 0; r < kTogether; ++r) sums[r] = warp_sum(sums[r]);
}

// Every row of both matrices begins on a 16-byte boundary, and ends on one.
template <typename S> __device__ __forceinline__ bool rows_aligned(const S* a, const S* b, int64_t hidden) {
  return is_aligned(a) && is_aligned(b) && hidden % Format<S>::kWidth == 0;
}

template <typename S> __global__ void __launch_bounds__(kThreads) score_kernel(const HeadArgs args) {
  using F = Format<S>;
  using Real = typename F::Real;
  using State = algebra::SoftmaxState<Real>;
  Exchange<sizeof(State)> exchange;
  const int64_t item = blockIdx.x;
  const bool is_point = item >= args.segments;
  const Use use = read_use(args, item);
  const Finding finding = check_use(args, item, use);
  Real* scores = static_cast<Real*>(args.scores) + use.score;
  Real* grads = args.grad_scores == nullptr ? nullptr : static_cast<Real*>(args.grad_scores) + use.score;
  Real* loss = static_cast<Real*>(args.loss) + item;
  const Team block = make_team(Level::block);

  if (finding.kind != FaultKind::none) {
    for (int64_t i = block.thread; finding.kind != FaultKind::offsets && i < use.length; i += block.size) {
      scores[i] = Real(NAN);
      if (grads != nullptr) grads[i] = Real(0);
    }
    if (block.thread == 0) {
      *loss = Real(NAN);
      report(args.fault, item, finding);
    }
    exchange.join();
    return;
  }

  const bool one_feature = use.features == 1;
  const S* feature = static_cast<const S*>(args.features) + use.feature * args.hidden;
  const S* row = static_cast<const S*>(args.weight) + use.row * args.hidden;
  const S* bias = args.bias == nullptr ? nullptr : static_cast<const S*>(args.bias) + use.row;
  const bool aligned = rows_aligned(feature, row, args.hidden);
  for (int64_t first = warp_index() * kTogether; first < use.length; first += kWarps * kTogether) {
    const int rows = use.length - first < kTogether ? static_cast<int>(use.length - first) : kTogether;
    const S* moving = (one_feature ? row : feature) + first * args.hidden;
    Real sums[kTogether];
    dot(one_feature ? feature : row, moving, args.hidden, rows, aligned, sums);
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      if (r != lane_index() || r >= rows) continue;
      const Real plus = bias == nullptr ? Real(0) : F::real(bias[one_feature ? first + r : 0]);
      scores[first + r] = sums[r] + plus;
    }
  }
  __syncthreads();

  const Real weight = args.loss_weight[item];
  if (is_point) {
    if (block.thread == 0) {
      const Real value = args.value[item - args.segments];
      *loss = algebra::squared_error(scores[0], value);
      if (grads != nullptr) *grads = algebra::squared_error_gradient(scores[0], value, weight);
    }
  } else if (args.target[item] == kIgnore) {
    if (block.thread == 0) *loss = Real(0);
    for (int64_t i = block.thread; grads != nullptr && i < use.length; i += block.size) grads[i] = Real(0);
  } else {
    const int64_t target = args.target[item];
    const Real target_score = scores[target], anchor = algebra::softmax_anchor(target_score);
    State state = algebra::softmax_start<Real>();
    for (int64_t i = block.thread; i < use.length; i += block.size) {
      if (i == target) algebra::softmax_add_target(state, scores[i], anchor);
      else algebra::softmax_add(state, scores[i], anchor);
    }
    state = merge_team(block, exchange, state);
    const Real smoothing = args.smoothing == nullptr ? Real(0) : Real(args.smoothing[item]);
    const algebra::SoftmaxRow<Real> finished = algebra::softmax_finish<Real>(
        state, target_score, Real(use.length), weight, smoothing, Real(args.z_loss));
    if (block.thread == 0) *loss = finished.loss;
    for (int64_t i = block.thread; grads != nullptr && i < use.length; i += block.size) {
      grads[i] = i == target ? finished.at_target : algebra::softmax_gradient(finished, scores[i]);
    }
  }
  exchange.join();
}

// A run of terms of one output row: score gradients from `score` on, times rows of the other matrix from `other` on.
struct Terms {
  int64_t score, other, count;
};

__host__ __device__ constexpr int64_t tile_columns(int width) { return int64_t(kWarp) * width; }

// The sum of terms, of one tile of one output row. Of the runs of one term warp w takes the runs w, w + kWarps, ..., of
// a longer run the terms w, w + kWarps, ...: the same ones in the same order every time.
template <typename S> struct Gather {
  using F = Format<S>;
  using Real = typename F::Real;
  static constexpr int kTerms = 2;
  static constexpr size_t kList = sizeof(Terms) * kThreads;
  static constexpr size_t kShared = kList + sizeof(int) * kWarps + sizeof(Real) * kWarps * (kWarp * F::kWidth + 1);

  const HeadArgs& args;
  bool of_weight;  // the output is a row of grad_weight; else of grad_features
  int64_t index;   // of the row
  int64_t column;  // the tile's first
  bool aligned;
  Real sums[F::kWidth];  // of columns `column_of(j)`
  Real bias;

  __device__ __forceinline__ int64_t column_of(int j) const {
    return column + (aligned ? lane_index() * F::kWidth + j : lane_index() + j * kWarp);
  }

  // Terms `first`, `first` + kWarps, ... below `count`, kTerms at a time so that as many loads are on their way.
  // term(i, score, other) says where term i is, and whether it is one.
  template <typename Term> __device__ __forceinline__ void add(int64_t first, int64_t count, Term term) {
    const S* matrix = static_cast<const S*>(of_weight ? args.features : args.weight);
    for (; first < count; first += kTerms * kWarps) {
      Real g[kTerms];
      uint4 v[kTerms];  // packed: registers
#pragma unroll
      for (int r = 0; r < kTerms; ++r) {
        int64_t score = 0, other = 0;
        const int64_t i = first + r * kWarps;
        const bool is_term = i < count && term(i, score, other);
        g[r] = is_term ? static_cast<const Real*>(args.grad_scores)[score] : Real(0);
        v[r] = load(is_term, matrix + other * args.hidden);
      }
#pragma unroll
      for (int r = 0; r < kTerms; ++r) {
        bias += g[r];
#pragma unroll
        for (int j = 0; j < F::kWidth; ++j) sums[j] += g[r] * F::get(v[r], j);
      }
    }
  }
  __device__ __forceinline__ uint4 load(bool is_term, const S* row) const {
    if (aligned) {
      const bool inside = is_term && column_of(0) < args.hidden;
      return inside ? *reinterpret_cast<const uint4*>(row + column_of(0)) : make_uint4(0, 0, 0, 0);
    }
    Real v[F::kWidth];
#pragma unroll
    for (int j = 0; j < F::kWidth; ++j) {
      v[j] = is_term && column_of(j) < args.hidden ? F::real(row[column_of(j)]) : Real(0);
    }
    return F::pack(v);
  }

  __device__ __forceinline__ bool find(int64_t item, Terms& terms) const {
    if (item >= args.segments + args.points) return false;
    const Use use = read_use(args, item);
    if (of_weight ? !use.has_row(index) : !use.has_feature(index)) return false;
    if (check_use(args, item, use).kind != FaultKind::none) return false;
    // Of a segment with many rows and one feature, a row has one term and the feature all of them; and conversely.
    const int64_t place = of_weight ? index - use.row : index - use.feature;
    const bool all = of_weight ? use.rows == 1 : use.features == 1;
    terms.score = use.score + (all ? 0 : place);
    terms.other = of_weight ? use.feature : use.row;
    terms.count = all ? use.length : 1;
    return true;
  }

  __device__ __forceinline__ void run() {
    Terms* list = reinterpret_cast<Terms*>(shared_memory());
    int* counts = reinterpret_cast<int*>(shared_memory() + kList);
    Real* partial = reinterpret_cast<Real*>(shared_memory() + kList + sizeof(int) * kWarps);
    for (int64_t first = 0; first < args.segments + args.points; first += kThreads) {
      Terms mine;
      const bool found = find(first + threadIdx.x, mine);
      const unsigned lanes = __ballot_sync(kAllLanes, found);
      if (lane_index() == 0) counts[warp_index()] = __popc(lanes);
      __syncthreads();
      int before = __popc(lanes & ((1u << lane_index()) - 1)), total = 0;
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp_index()) before += counts[w];
        total += counts[w];
      }
      if (found) list[before] = mine;
      __syncthreads();
      add(warp_index(), total, [&](int64_t t, int64_t& score, int64_t& other) {
        score = list[t].score;
        other = list[t].other;
        return list[t].count == 1;
      });
      for (int t = 0; t < total; ++t) {
        const Terms terms = list[t];
        if (terms.count == 1) continue;
        add(warp_index(), terms.count, [&](int64_t i, int64_t& score, int64_t& other) {
          score = terms.score + i;
          other = terms.other + i;
          return true;
        });
      }
      __syncthreads();
    }
    constexpr int kRow = kWarp * F::kWidth + 1;  // one warp's sums, and its bias
#pragma unroll
    for (int j = 0; j < F::kWidth; ++j) partial[warp_index() * kRow + j * kWarp + lane_index()] = sums[j];
    if (lane_index() == 0) partial[warp_index() * kRow + kRow - 1] = bias;
    __syncthreads();
    S* to = static_cast<S*>(of_weight ? args.grad_weight : args.grad_features) + index * args.hidden;
    for (int place = threadIdx.x; place < kRow; place += kThreads) {
      Real sum = Real(0);
      for (int w = 0; w < kWarps; ++w) sum += partial[w * kRow + place];
      const int lane = place % kWarp, j = place / kWarp;
      const int64_t at = column + (aligned ? lane * F::kWidth + j : place);
      if (place < kRow - 1) {
        if (at < args.hidden) to[at] = F::stored(sum);
      } else if (of_weight && column == 0 && args.grad_bias != nullptr) {
        static_cast<S*>(args.grad_bias)[index] = F::stored(sum);
      }
    }
  }
};

// The sums first: they take longest. Then tiles of rows of grad_weight, then of grad_features.
template <typename S>
__global__ void __launch_bounds__(kThreads) gather_kernel(const HeadArgs args, const SumArgs sums, const int64_t parts,
                                                          const int64_t tiles) {
  using F = Format<S>;
  if (blockIdx.x < parts) return sum_part<typename F::Real>(sums, blockIdx.x);
  const int64_t output = (blockIdx.x - parts) / tiles, tile = (blockIdx.x - parts) % tiles;
  const bool of_weight = output < args.row_count;
  Gather<S> gather{args,
                   of_weight,
                   of_weight ? output : output - args.row_count,
                   tile * tile_columns(F::kWidth),
                   rows_aligned(static_cast<const S*>(args.features), static_cast<const S*>(args.weight), args.hidden),
                   {},
                   typename F::Real(0)};
  gather.run();
}

template <typename S> int launch_heads(const HeadArgs& args, void* stream) {
  using Real = typename Format<S>::Real;
  using Gathers = Gather<S>;
  const int64_t items = args.segments + args.points;
  const int error = launch(score_kernel<S>, items, 1, kThreads,
                           Exchange<sizeof(algebra::SoftmaxState<Real>)>::kBytes, stream, args);
  if (error != cudaSuccess) return error;
  SumArgs sums = {};
  sums.wide = sizeof(Real) == 8;
  sums.count = items;
  sums.tasks = args.tasks;
  sums.loss = args.loss;
  sums.weight = args.loss_weight;
  sums.task = args.task;
  sums.total = args.total;
  sums.by_task = args.by_task;
  sums.fault = args.fault;
  const int64_t columns = tile_columns(Format<S>::kWidth);
  const int64_t tiles = std::max<int64_t>((args.hidden + columns - 1) / columns, 1), parts = sum_parts(sums);
  const int64_t outputs = args.grad_scores == nullptr ? 0 : args.row_count + args.feature_count;
  return launch(gather_kernel<S>, parts + outputs * tiles, 1, kThreads, std::max(kSumShared, Gathers::kShared), stream,
                args, sums, parts, tiles);
}

}  // namespace
}  // namespace cuda

int head_losses_cuda(const HeadArgs& args, void* stream) {
  return cuda::with_format(args.storage, [&](auto s) { return cuda::launch_heads<decltype(s)>(args, stream); });
}

}  // namespace sett
