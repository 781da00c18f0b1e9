// The walk over one segment by its team.
//
// Owns: what a thread loads, holds, adds up and writes. A team (warp, block or cluster of blocks, by the segment's
// length) loads a segment into its registers, all loads before the first use, merges its accumulators, and writes the
// gradient from the registers: each score is read once and its gradient written once. A segment that is longer than
// the team's registers goes through them in chunks, read a second time in reverse: the last chunk is still there, and
// the ones before it are the likeliest to be in L2.
#pragma once

#include <type_traits>

#include "../sett.h"
#include "device.h"
#include "fault.h"
#include "format.h"
#include "team.h"

#ifndef SETT_SEGMENT_THREADS
#define SETT_SEGMENT_THREADS 256  // tests on a CPU have fewer
#endif

namespace sett {
namespace cuda {
enum class Mode { entropy, divergence, both };

// Blocks have up to 256 threads where clusters give a long row more of them. Cross-entropy of 16-bit scores holds 8
// vectors of 16 bytes a thread in at most 80 registers: three blocks a multiprocessor, 96 KiB of scores, so that one's
// loads and stores run under the others' arithmetic and barriers; 8 blocks hold 131072 scores. Everything else holds
// twice the bytes in at most 128 registers: two blocks, 128 KiB. Either is several times what covers the latency of HBM
// at full bandwidth. Without clusters one block takes all the registers of a multiprocessor. fp64 is not made for speed.
// Nothing may spill (tests/kernels/test_cuda_compiles.py).
constexpr int kThreads = SETT_SEGMENT_THREADS;

template <typename S, Mode kMode> constexpr bool is_lean() { return kMode == Mode::entropy && sizeof(S) == 2; }
template <typename S, Mode kMode> constexpr int most_threads() {
  return sizeof(S) == 8 ? kThreads : kThreads * (is_lean<S, kMode>() ? 3 : 2);
}
// 16-byte vectors of x that a thread holds, and as many of y.
template <typename S, Mode kMode> constexpr int held_vectors() {
  if (sizeof(S) == 8) return kMode == Mode::entropy ? 4 : 1;
  if (sizeof(S) == 4 && kMode == Mode::both) return 7;
  return is_lean<S, kMode>() || kMode != Mode::entropy ? 8 : 16;
}

// Where in the launch a warp is, parked in shared memory.
struct Place {
  int64_t segment;   // under way, by its number
  int step, rounds;  // of the kernel's loop
  int blocks, rank;  // of the cluster, and of this block in it
  int last;          // chunk of the segment
  double at_target;  // the gradient of the target's score, for the lane that writes it
};

template <typename S, Mode kMode> struct Kernel {
  using F = Format<S>;
  using Real = typename F::Real;
  using A = typename F::Arithmetic;
  static constexpr int kWidth = F::kWidth;
  static constexpr int kHeld = held_vectors<S, kMode>();
  static constexpr bool kEntropy = kMode != Mode::divergence;
  static constexpr bool kDivergence = kMode != Mode::entropy;
  using State = std::conditional_t<kDivergence, PairState<Real>, algebra::SoftmaxState<Real>>;
  using Shared = Exchange<sizeof(State)>;
  static constexpr size_t kShared = Shared::kBytes + sizeof(Place) * kMaxWarps;

  // This warp's place.
  static __device__ __forceinline__ volatile Place* place() {
    return reinterpret_cast<volatile Place*>(shared_memory() + Shared::kBytes) + warp_index();
  }
  static __device__ __forceinline__ volatile int64_t* number() { return &place()->segment; }

  // One segment, by its number. Cheap to find again: what a thread need not keep in registers over a barrier.
  struct Segment {
    int64_t begin;
    int64_t length;
    int64_t target;  // -1 where there is no cross-entropy
    Real smoothing;
    Span<S> span;

    __device__ __forceinline__ Segment(const SegmentArgs& args, int64_t g)
        : begin(args.offsets[g]),
          length(args.offsets[g + 1] - begin),
          target(-1),
          smoothing(Real(0)),
          span(static_cast<const S*>(args.x) + begin, length, tensors_apart(args)) {
      if (!kEntropy || args.target[g] == kIgnore) return;
      target = args.target[g];
      if (args.smoothing != nullptr) smoothing = args.smoothing[g];
    }
  };

  static __device__ __forceinline__ const S* at(const void* base, int64_t i) { return static_cast<const S*>(base) + i; }
  static __device__ __forceinline__ S* at(void* base, int64_t i) { return static_cast<S*>(base) + i; }

  struct Row {
    algebra::SoftmaxRow<Real> softmax;
    algebra::DivergenceRow<Real> divergence;
    Real kl_weight;
  };

  // One score and its partner, its exp(x - top) returned. All tops are at least the scores: nothing is rescaled.
  static __device__ __forceinline__ Real add(State& s, Real x, Real y) {
    if constexpr (kDivergence) {
      algebra::DivergenceState<Real>& d = s.divergence;
      using algebra::exponential_minus_one;
      using algebra::magnitude;
      using algebra::score_difference;
      using algebra::select;
      using algebra::shifted_exponential;
      const A difference = score_difference(A(x), A(y)), size = magnitude(difference);
      const A e_x = shifted_exponential(A(x), A(d.top_x)), e_y = shifted_exponential(A(y), A(d.top_y));
      const A zero = A(Real(0));
      d.lift += raw(select(size <= A(Real(algebra::kNear)), e_x * exponential_minus_one(-difference), zero));
      d.mean_x += raw(select(e_x == zero, zero, e_x * difference));
      d.mean_y += raw(select(e_y == zero, zero, e_y * difference));
      d.sum_y += raw(e_y);
      d.spread = larger(d.spread, raw(size));
      return raw(e_x);
    } else {
      using algebra::shifted_exponential;
      return raw(shifted_exponential(A(x), A(s.top)));
    }
  }

  // The sum of exp(x - top), of which the target's is left out where there is a target.
  static __device__ __forceinline__ Real& rest(State& s) {
    if constexpr (kDivergence) return s.divergence.sum_x;
    else return s.rest;
  }

  static __device__ __forceinline__ void raise_to(State& s, Real top_x, Real top_y) {
    if constexpr (kDivergence) {
      s.divergence = raise(s.divergence, larger(s.divergence.top_x, top_x), larger(s.divergence.top_y, top_y));
    } else {
      s = raise(s, larger(s.top, top_x));
    }
  }

  static __device__ __forceinline__ void add_edge(const SegmentArgs& args, State& s, const Segment& segment,
                                                  Real anchor, int64_t i) {
    const Real x = F::real(*at(args.x, segment.begin + i));
    const Real y = kDivergence ? F::real(*at(args.y, segment.begin + i)) : Real(0);
    raise_to(s, x, y);
    const Real e = add(s, x, y);
    if (i != segment.target) rest(s) += e;
    if (segment.smoothing != Real(0)) s.linear += x - anchor;
  }

  // The sum of exp(x - top) of a vector.
  static __device__ __forceinline__ Real add_vector(State& s, const uint4& x, const uint4& y) {
    Real sum = Real(0);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += add(s, F::get(x, i), kDivergence ? F::get(y, i) : Real(0));
    return sum;
  }

  // Gradients of one score; adds its part of J.
  static __device__ __forceinline__ void gradient(const Row& row, Real x, Real y, bool is_target, Real& grad_x,
                                                  Real& grad_y, Real& value) {
    grad_x = Real(0);
    if constexpr (kEntropy) {
      grad_x = is_target ? row.softmax.at_target : raw(algebra::softmax_gradient(row.softmax, A(x)));
    }
    if constexpr (kDivergence) {
      const algebra::DivergenceTerm<A> term = algebra::divergence_term(row.divergence, A(x), A(y));
      value += raw(term.value);
      grad_x += row.kl_weight * raw(term.grad_x);
      grad_y = row.kl_weight * raw(term.grad_y);
    }
  }

  static __device__ __forceinline__ void write_edge(const SegmentArgs& args, const Row& row, const Segment& segment,
                                                    int64_t i, Real& value) {
    const Real x = F::real(*at(args.x, segment.begin + i));
    const Real y = kDivergence ? F::real(*at(args.y, segment.begin + i)) : Real(0);
    Real grad_x, grad_y;
    gradient(row, x, y, i == segment.target, grad_x, grad_y, value);
    if (args.grad_x == nullptr) return;
    *at(args.grad_x, segment.begin + i) = F::stored(grad_x);
    if constexpr (kDivergence) *at(args.grad_y, segment.begin + i) = F::stored(grad_y);
  }

  // `to`: where in bytes both gradients of the vector belong. Two scores at a time are in registers.
  static __device__ __forceinline__ void write_vector(const SegmentArgs& args, const Row& row, const uint4& x,
                                                      const uint4& y, int64_t to, Real& value) {
    uint4 to_x = make_uint4(0, 0, 0, 0), to_y = to_x;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      Real grad_x[2], grad_y[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int k = 2 * i + j;
        gradient(row, F::get(x, k), kDivergence ? F::get(y, k) : Real(0), false, grad_x[j], grad_y[j], value);
      }
      F::put(to_x, i, grad_x[0], grad_x[1]);
      if constexpr (kDivergence) F::put(to_y, i, grad_y[0], grad_y[1]);
    }
    if (args.grad_x == nullptr) return;
    *reinterpret_cast<uint4*>(static_cast<char*>(args.grad_x) + to) = to_x;
    if constexpr (kDivergence) *reinterpret_cast<uint4*>(static_cast<char*>(args.grad_y) + to) = to_y;
  }

  // A segment without loss (not a number: with a bad one): zero gradients.
  static __device__ __forceinline__ void leave_out(const SegmentArgs& args, const Team& team, int64_t g, int64_t begin,
                                                   int64_t length, Real loss) {
    if (args.grad_x != nullptr) {
      clear(at(args.grad_x, begin), length, team.thread, team.size);
      if constexpr (kDivergence) clear(at(args.grad_y, begin), length, team.thread, team.size);
    }
    if (team.thread != 0) return;
    if constexpr (kEntropy) static_cast<Real*>(args.loss)[g] = loss;
    if constexpr (kDivergence) static_cast<Real*>(args.kl)[g] = loss;
  }

  // The 16-byte vectors a thread holds of a chunk of a segment; a place without one has scores of -inf, which add
  // nothing. Those of a warp are consecutive; of a thread, kWarp apart: one address serves all of a thread's loads.
  // Vector v exists if v * kWarp is less than `room`.
  struct Chunk {
    uint4 x[kHeld], y[kHeld];
    int room;

    __device__ __forceinline__ void load(const SegmentArgs& args, const Segment& segment, const Team& team, int c) {
      const int64_t first = first_vector(team, c);
      const uint4* from_x = vectors_at(args.x, segment) + first;
      const uint4* from_y = vectors_at(args.y, segment) + first;
      room = clamp(segment.span.vectors - first);
#pragma unroll
      for (int v = 0; v < kHeld; ++v) {
        x[v] = v * kWarp < room ? from_x[v * kWarp] : F::lowest();
        if constexpr (kDivergence) y[v] = v * kWarp < room ? from_y[v * kWarp] : F::lowest();
        else y[v] = make_uint4(0, 0, 0, 0);
      }
    }
    // Which vector of this thread has the target in it; -1: none.
    __device__ __forceinline__ int holder(const Segment& segment, const Team& team, int c) const {
      if (!kEntropy || segment.target < segment.span.head) return -1;
      const int past = clamp((segment.target - segment.span.head) / kWidth - first_vector(team, c));
      return past >= 0 && past < room && past % kWarp == 0 && past / kWarp < kHeld ? past / kWarp : -1;
    }
    __device__ __forceinline__ void top(Real& top_x, Real& top_y) const {
      uint4 tops_x = x[0], tops_y = y[0];
#pragma unroll
      for (int v = 1; v < kHeld; ++v) {
        tops_x = F::larger_of(tops_x, x[v]);
        if constexpr (kDivergence) tops_y = F::larger_of(tops_y, y[v]);
      }
      top_x = F::get(tops_x, 0);
      top_y = F::get(tops_y, 0);
#pragma unroll
      for (int i = 1; i < kWidth; ++i) {
        top_x = larger(top_x, F::get(tops_x, i));
        if constexpr (kDivergence) top_y = larger(top_y, F::get(tops_y, i));
      }
    }
  };

  // Of chunk c, this thread's first vector.
  static __device__ __forceinline__ int64_t first_vector(const Team& team, int c) {
    return int64_t(c) * kHeld * team.size + team.thread / kWarp * (kWarp * kHeld) + lane_index();
  }
  // Whether the target is in a vector of this thread, in any chunk.
  static __device__ __forceinline__ bool owns_target(const Segment& segment, const Team& team) {
    if (!kEntropy || segment.target < segment.span.head) return false;
    const int64_t vector = (segment.target - segment.span.head) / kWidth;
    if (vector >= segment.span.vectors) return false;
    const int in_chunk = static_cast<int>(vector % (kHeld * team.size));
    return in_chunk / (kWarp * kHeld) == team.thread / kWarp && in_chunk % kWarp == lane_index();
  }
  static __device__ __forceinline__ const uint4* vectors_at(const void* base, const Segment& segment) {
    return reinterpret_cast<const uint4*>(at(base, segment.begin + segment.span.head));
  }
  static __device__ __forceinline__ uint4* vectors_at(void* base, const Segment& segment) {
    return reinterpret_cast<uint4*>(at(base, segment.begin + segment.span.head));
  }

  static __device__ __forceinline__ void prefetch_first(const SegmentArgs& args, const Segment& segment,
                                                        const Team& team) {
    for (int64_t v = first_vector(team, 0), n = 0; n < kHeld && v < segment.span.vectors; v += kWarp, ++n) {
      prefetch(vectors_at(args.x, segment) + v);
      if constexpr (kDivergence) prefetch(vectors_at(args.y, segment) + v);
    }
  }

  // The sum over the scores of the target's vector but the target itself: so much is read a second time, by one thread.
  static __device__ __forceinline__ void add_beside_target(const SegmentArgs& args, State& s, const Segment& segment) {
    const int place = static_cast<int>((segment.target - segment.span.head) % kWidth);
    const int64_t first = segment.begin + segment.target - place;
#pragma unroll 1
    for (int i = 0; i < kWidth; ++i) {
      if (i == place) continue;
      const Real x = F::real(*at(args.x, first + i));
      raise_to(s, x, algebra::Limits<Real>::lowest());
      using algebra::shifted_exponential;
      Real top;
      if constexpr (kDivergence) top = s.divergence.top_x;
      else top = s.top;
      rest(s) += raw(shifted_exponential(A(x), A(top)));
    }
  }

  static __device__ __forceinline__ void run(const SegmentArgs& args, const Team& team, Shared& exchange) {
    Chunk chunk;
    State state = no_state(static_cast<State*>(nullptr));
    Real target_score = Real(0), target_partner = Real(0);
    {
      int last = 0;
      const Segment segment(args, *number());
      if (segment.target >= 0) {
        target_score = F::real(*at(args.x, segment.begin + segment.target));
        if constexpr (kDivergence) target_partner = F::real(*at(args.y, segment.begin + segment.target));
      }
      const Real anchor = algebra::softmax_anchor(target_score);
      const int64_t reach = int64_t(kHeld) * team.size;
      // Single scores first, while registers are free. The few warps that have some send for their vectors before.
      const bool beside = owns_target(segment, team);
      if (__ballot_sync(kAllLanes, beside || team.thread < segment.span.edges(segment.length)) != 0) {
        prefetch_first(args, segment, team);
      }
      for (int64_t i = team.thread; i < segment.span.edges(segment.length); i += team.size) {
        add_edge(args, state, segment, anchor, segment.span.edge(i));
      }
      if (beside) add_beside_target(args, state, segment);
      while (true) {
        chunk.load(args, segment, team, last);
        Real top_x, top_y;
        chunk.top(top_x, top_y);
        raise_to(state, top_x, top_y);
        const int holder = chunk.holder(segment, team, last);
#pragma unroll
        for (int v = 0; v < kHeld; ++v) {
          if (v * kWarp >= chunk.room) continue;
          const Real sum = add_vector(state, chunk.x[v], chunk.y[v]);
          if (v != holder) rest(state) += sum;
        }
        if (segment.smoothing != Real(0)) {
#pragma unroll
          for (int v = 0; v < kHeld; ++v) {
            if (v * kWarp >= chunk.room) continue;
#pragma unroll
            for (int i = 0; i < kWidth; ++i) state.linear += F::get(afresh(chunk.x[v]), i) - anchor;
          }
        }
        if ((last + 1) * reach >= segment.span.vectors) break;
        ++last;
      }
      park(&place()->last, last);
    }
    state = merge_team(team, exchange, state);

    const Segment segment(args, *number());
    const Row row = finish(args, segment, team, state, *number(), target_score);
    if (!kDivergence && args.grad_x == nullptr) return;
    if (args.grad_x != nullptr && owns_target(segment, team)) {
      Real grad_x, grad_y, counted = Real(0);
      gradient(row, target_score, target_partner, true, grad_x, grad_y, counted);
      place()->at_target = static_cast<double>(grad_x);
    }
    Real value = Real(0);
    for (int c = place()->last; c >= 0; --c) {
      if (c != place()->last) chunk.load(args, segment, team, c);
      const int64_t to = (segment.begin + segment.span.head) * int64_t(sizeof(S)) +
                         first_vector(team, c) * int64_t(sizeof(uint4));
#pragma unroll
      for (int v = 0; v < kHeld; ++v) {
        if (v * kWarp >= chunk.room) continue;
        write_vector(args, row, afresh(chunk.x[v]), afresh(chunk.y[v]), to + v * kWarp * int64_t(sizeof(uint4)), value);
      }
    }
    write_rest(args, row, team, value);
    if constexpr (kDivergence) {
      value = merge_team(team, exchange, value);
      if (team.thread == 0) static_cast<Real*>(args.kl)[*number()] = value;
    }
  }

  // The edges and the target.
  static __device__ __forceinline__ void write_rest(const SegmentArgs& args, const Row& row, const Team& team,
                                                    Real& value) {
    const Segment segment(args, *number());
    for (int64_t i = team.thread; i < segment.span.edges(segment.length); i += team.size) {
      write_edge(args, row, segment, segment.span.edge(i), value);
    }
    // Over what this thread wrote before as if the target were another score.
    if (args.grad_x == nullptr || !owns_target(segment, team)) return;
    *at(args.grad_x, segment.begin + segment.target) = F::stored(static_cast<Real>(place()->at_target));
  }

  static __device__ __forceinline__ int clamp(int64_t n) {
    return static_cast<int>(n < 0 ? -1 : n < (1 << 30) ? n : 1 << 30);
  }

  // Whether the tensors cross 16-byte boundaries at different elements.
  static __device__ __forceinline__ bool tensors_apart(const SegmentArgs& args) {
    const uintptr_t x = reinterpret_cast<uintptr_t>(args.x);
    uintptr_t differ = 0;
    if (kDivergence) differ |= x ^ reinterpret_cast<uintptr_t>(args.y);
    if (args.grad_x != nullptr) differ |= x ^ reinterpret_cast<uintptr_t>(args.grad_x);
    if (kDivergence && args.grad_x != nullptr) differ |= x ^ reinterpret_cast<uintptr_t>(args.grad_y);
    return differ % sizeof(uint4) != 0;
  }

  // The row scalars, and the loss of the cross-entropy written.
  static __device__ __forceinline__ Row finish(const SegmentArgs& args, const Segment& segment, const Team& team,
                                               State state, int64_t g, Real target_score) {
    Row row;
    algebra::SoftmaxState<Real> softmax;
    if constexpr (kDivergence) softmax = {state.divergence.top_x, state.divergence.sum_x, state.linear};
    else softmax = state;
    row.softmax = {Real(0), softmax.top, Real(0), Real(0), Real(0)};  // ignored
    if (segment.target >= 0) {
      row.softmax = algebra::softmax_finish<Real>(softmax, target_score, Real(segment.length), Real(args.weight[g]),
                                                  segment.smoothing, Real(args.z_loss));
      if constexpr (kDivergence) {
        state.divergence.sum_x += algebra::shifted_exponential(target_score, softmax.top);
      }
    }
    if constexpr (kDivergence) {
      row.divergence = algebra::divergence_finish(state.divergence);
      row.kl_weight = Real(args.kl_weight[g]);
    }
    if constexpr (kEntropy) {
      if (team.thread == 0) static_cast<Real*>(args.loss)[g] = row.softmax.loss;
    }
    return row;
  }

  // What keeps a segment with good offsets from having a loss of its own.
  static __device__ __forceinline__ Finding check(int64_t target, int64_t length) {
    if (!kEntropy || target == kIgnore) return {FaultKind::none, 0};
    if (length == 0) return {FaultKind::empty, target};
    return {target < 0 || target >= length ? FaultKind::target : FaultKind::none, target};
  }
};

}  // namespace cuda
}  // namespace sett
