// Owns: the softmax losses of one segment: cross-entropy, the symmetric divergence J, or both in one read.
//
// Two passes: one accumulates the states of row_algebra.h, leaving the target's score apart, one writes the gradients
// while the scores are still in a cache. Gradients may overwrite scores: each vector is read before it is written.
#pragma once

#include "blocks.h"

namespace sett {
namespace SETT_CPU_ISA {

template <typename S> struct Segment {
  using R = Real<S>;
  const S* x;
  const S* y;      // null: no J
  S* grad_x;       // null: no gradients
  S* grad_y;
  int64_t length;
  int64_t target;  // -1: no cross-entropy
  R weight, kl_weight, smoothing, z_loss;
};

template <typename R> struct Losses { R cross_entropy, divergence; };

// Sums are accumulated over so many vectors and then added up, which bounds their rounding errors in long segments.
constexpr int64_t kVectorsPerSum = 128;
constexpr int kGroup = 8;      // vectors held in registers between the search for the largest and the sum
constexpr int kPairGroup = 4;  // the same for pairs of x and y

// Takes in n scores, none of them the target's.
template <typename M, bool kLinear, typename S>
SETT_INLINE void take_scores(SoftmaxState<typename M::Vector>& s, typename M::Vector anchor, const S* x, int64_t n) {
  using V = typename M::Vector;
  constexpr int64_t L = M::kLanes;
  const V low = algebra::Limits<V>::lowest();
  int64_t i = 0;
  for (; i + kGroup * L <= n; i += kGroup * L) {
    V v[kGroup];
    for (int j = 0; j < kGroup; ++j) v[j] = M::load(x + i + j * L);
    const V high =
        maximum(maximum(maximum(v[0], v[1]), maximum(v[2], v[3])), maximum(maximum(v[4], v[5]), maximum(v[6], v[7])));
    if (M::any_above(high, s.top)) softmax_raise(s, raised_top<M>(s.top, high));
    V sum[2] = {V(0.0f), V(0.0f)}, linear[2] = {V(0.0f), V(0.0f)};
    for (int j = 0; j < kGroup; ++j) {
      sum[j & 1] = sum[j & 1] + algebra::shifted_exponential(v[j], s.top);
      if (kLinear) linear[j & 1] = linear[j & 1] + (v[j] - anchor);
    }
    s.rest = s.rest + (sum[0] + sum[1]);
    if (kLinear) s.linear = s.linear + (linear[0] + linear[1]);
  }
  if (i == n) return;
  const int64_t rest = i;
  V high = low;
  for (i = rest; i + L <= n; i += L) high = maximum(high, M::load(x + i));
  if (i < n) high = maximum(high, M::load_first(x + i, n - i, low));
  if (M::any_above(high, s.top)) softmax_raise(s, raised_top<M>(s.top, high));
  for (i = rest; i + L <= n; i += L) {
    const V v = M::load(x + i);
    s.rest = s.rest + algebra::shifted_exponential(v, s.top);
    if (kLinear) s.linear = s.linear + (v - anchor);
  }
  if (i < n) {
    s.rest = s.rest + algebra::shifted_exponential(M::load_first(x + i, n - i, low), s.top);
    if (kLinear) s.linear = s.linear + (M::load_first(x + i, n - i, anchor) - anchor);
  }
}

template <typename M, bool kLinear, typename S>
SETT_INLINE void take_many_scores(SoftmaxState<typename M::Vector>& s, typename M::Vector anchor, const S* x,
                                  int64_t n) {
  using V = typename M::Vector;
  constexpr int64_t step = kVectorsPerSum * M::kLanes;
  if (n <= step) return take_scores<M, kLinear>(s, anchor, x, n);
  for (int64_t i = 0; i < n; i += step) {
    SoftmaxState<V> part = {s.top, V(0.0f), V(0.0f)};
    take_scores<M, kLinear>(part, anchor, x + i, smaller(step, n - i));
    s = algebra::softmax_merge(s, part);
  }
}

template <typename M, bool kLinear, typename S>
inline SoftmaxState<typename M::Scalar> softmax_state(const Segment<S>& g) {
  using V = typename M::Vector;
  const auto anchor = algebra::softmax_anchor(widen(g.x[g.target]));
  SoftmaxState<V> s = algebra::softmax_start<V>();
  take_many_scores<M, kLinear>(s, V(anchor), g.x, g.target);
  take_many_scores<M, kLinear>(s, V(anchor), g.x + g.target + 1, g.length - g.target - 1);
  auto all = fold<M>(s);
  algebra::softmax_add_target(all, widen(g.x[g.target]), anchor);
  return all;
}

template <typename M, typename S> inline void clear(S* p, int64_t n) {
  if (p && n > 0) memset(p, 0, static_cast<size_t>(n) * sizeof(S));
}

// The gradient of the cross-entropy, the target's score included, which then gets its own.
template <typename M, typename S>
inline void write_softmax_gradient(const Segment<S>& g, const algebra::SoftmaxRow<typename M::Scalar>& row) {
  using V = typename M::Vector;
  int64_t i = 0;
  for (; i + M::kLanes <= g.length; i += M::kLanes) {
    M::store(g.grad_x + i, algebra::softmax_gradient(row, M::load(g.x + i)));
  }
  if (i < g.length) {
    const V v = M::load_first(g.x + i, g.length - i, V(row.top));
    M::store_first(g.grad_x + i, g.length - i, algebra::softmax_gradient(row, v));
  }
  g.grad_x[g.target] = narrow<S>(row.at_target);
}

template <typename S>
inline algebra::SoftmaxRow<Real<S>> finish(const Segment<S>& g, const SoftmaxState<Real<S>>& s) {
  using R = Real<S>;
  return algebra::softmax_finish<R>(s, widen(g.x[g.target]), static_cast<R>(g.length), g.weight, g.smoothing,
                                    g.z_loss);
}

template <typename M, typename S> inline Losses<typename M::Scalar> softmax_losses(const Segment<S>& g) {
  using R = typename M::Scalar;
  if (g.target < 0) {
    clear<M>(g.grad_x, g.length);
    return {R(0), R(0)};
  }
  const auto row = finish(g, g.smoothing == R(0) ? softmax_state<M, false>(g) : softmax_state<M, true>(g));
  if (g.grad_x && g.weight == R(0)) {
    clear<M>(g.grad_x, g.length);
  } else if (g.grad_x) {
    write_softmax_gradient<M>(g, row);
  }
  return {row.loss, R(0)};
}

// ---------------------------------------------------------------------------------------------------------------------
// With a second side.

template <typename V> struct PairState {
  DivergenceState<V> both;
  V linear;  // of x, see SoftmaxState
};

template <typename M, typename V> SETT_INLINE void raise_pair(PairState<V>& s, V high_x, V high_y) {
  if (M::any_above(high_x, s.both.top_x)) divergence_raise_x(s.both, raised_top<M>(s.both.top_x, high_x));
  if (M::any_above(high_y, s.both.top_y)) divergence_raise_y(s.both, raised_top<M>(s.both.top_y, high_y));
}

template <typename M, bool kLinear, typename S>
SETT_INLINE void take_pairs(PairState<typename M::Vector>& s, typename M::Vector anchor, const S* x, const S* y,
                            int64_t n) {
  using V = typename M::Vector;
  constexpr int64_t L = M::kLanes;
  const V low = algebra::Limits<V>::lowest();
  int64_t i = 0;
  for (; i + kPairGroup * L <= n; i += kPairGroup * L) {
    V v[kPairGroup], w[kPairGroup];
    for (int j = 0; j < kPairGroup; ++j) v[j] = M::load(x + i + j * L), w[j] = M::load(y + i + j * L);
    raise_pair<M>(s, maximum(maximum(v[0], v[1]), maximum(v[2], v[3])),
                  maximum(maximum(w[0], w[1]), maximum(w[2], w[3])));
    for (int j = 0; j < kPairGroup; ++j) {
      divergence_take(s.both, v[j], w[j]);
      if (kLinear) s.linear = s.linear + (v[j] - anchor);
    }
  }
  for (; i < n; i += L) {
    const bool whole = i + L <= n;
    const V v = whole ? M::load(x + i) : M::load_first(x + i, n - i, low);
    const V w = whole ? M::load(y + i) : M::load_first(y + i, n - i, low);
    raise_pair<M>(s, v, w);
    divergence_take(s.both, v, w);
    if (kLinear) s.linear = s.linear + ((whole ? v : M::load_first(x + i, n - i, anchor)) - anchor);
  }
}

template <typename M, bool kLinear, typename S>
inline void take_many_pairs(PairState<typename M::Vector>& s, typename M::Vector anchor, const S* x, const S* y,
                            int64_t n) {
  using V = typename M::Vector;
  constexpr int64_t step = kVectorsPerSum * M::kLanes;
  if (n <= step) return take_pairs<M, kLinear>(s, anchor, x, y, n);
  for (int64_t i = 0; i < n; i += step) {
    PairState<V> part = {algebra::divergence_start<V>(), V(0.0f)};
    take_pairs<M, kLinear>(part, anchor, x + i, y + i, smaller(step, n - i));
    s.both = algebra::divergence_merge(s.both, part.both);
    s.linear = s.linear + part.linear;
  }
}

// The second pass: the value of J, and with kGradient both gradients, with kCross that of the cross-entropy beside it.
template <typename M, bool kGradient, bool kCross, typename S>
inline typename M::Scalar divergence_pass(const Segment<S>& g,
                                          const algebra::DivergenceRow<typename M::Scalar>& row,
                                          const algebra::SoftmaxRow<typename M::Scalar>& cross) {
  using R = typename M::Scalar;
  using V = typename M::Vector;
  constexpr int64_t L = M::kLanes;
  const V low = algebra::Limits<V>::lowest(), weight(g.kl_weight);
  R total(0);
  for (int64_t begin = 0; begin < g.length; begin += kVectorsPerSum * L) {
    const int64_t end = smaller(begin + kVectorsPerSum * L, g.length);
    V value(0.0f);
    for (int64_t i = begin; i < end; i += L) {
      const bool whole = i + L <= end;
      const V x = whole ? M::load(g.x + i) : M::load_first(g.x + i, end - i, low);
      const V y = whole ? M::load(g.y + i) : M::load_first(g.y + i, end - i, low);
      const auto term = algebra::divergence_term(row, x, y);
      value = value + term.value;
      if (!kGradient) continue;
      V grad_x = weight * term.grad_x;
      if (kCross) grad_x = grad_x + algebra::softmax_gradient(cross, x);
      const V grad_y = weight * term.grad_y;
      if (whole) {
        M::store(g.grad_x + i, grad_x);
        M::store(g.grad_y + i, grad_y);
      } else {
        M::store_first(g.grad_x + i, end - i, grad_x);
        M::store_first(g.grad_y + i, end - i, grad_y);
      }
    }
    total = total + M::sum(value);
  }
  return total;
}

template <typename M, bool kLinear, typename S> inline Losses<typename M::Scalar> pair_losses(const Segment<S>& g) {
  using R = typename M::Scalar;
  using V = typename M::Vector;
  const bool cross = g.target >= 0;
  const int64_t before = cross ? g.target : g.length;
  const R z_x = cross ? widen(g.x[before]) : R(0), z_y = cross ? widen(g.y[before]) : R(0);
  const R anchor = algebra::softmax_anchor(z_x);
  PairState<V> lanes = {algebra::divergence_start<V>(), V(0.0f)};
  take_many_pairs<M, kLinear>(lanes, V(anchor), g.x, g.y, before);
  const int64_t after = before + 1;
  if (cross) take_many_pairs<M, kLinear>(lanes, V(anchor), g.x + after, g.y + after, g.length - after);
  auto both = fold<M>(lanes.both);

  algebra::SoftmaxRow<R> softmax_row = {};
  R at_target(0);
  if (cross) {
    // Without the target, the divergence's sum over x is the cross-entropy's `rest`.
    SoftmaxState<R> softmax = {both.top_x, both.sum_x, M::sum(lanes.linear)};
    algebra::softmax_add_target(softmax, z_x, anchor);
    softmax_row = finish(g, softmax);
    algebra::divergence_add(both, z_x, z_y);
  }
  const auto row = algebra::divergence_finish(both);
  if (cross) at_target = softmax_row.at_target + g.kl_weight * algebra::divergence_term(row, z_x, z_y).grad_x;
  softmax_row.top = row.top_x;  // they are equal; now the compiler knows, and takes one exponential for both

  const bool cross_gradient = cross && g.weight != R(0);
  Losses<R> losses = {softmax_row.loss, R(0)};
  if (!g.grad_x) {
    losses.divergence = divergence_pass<M, false, false>(g, row, softmax_row);
  } else if (g.kl_weight == R(0)) {
    losses.divergence = divergence_pass<M, false, false>(g, row, softmax_row);
    cross_gradient ? write_softmax_gradient<M>(g, softmax_row) : clear<M>(g.grad_x, g.length);
    clear<M>(g.grad_y, g.length);
  } else if (cross_gradient) {
    losses.divergence = divergence_pass<M, true, true>(g, row, softmax_row);
    g.grad_x[g.target] = narrow<S>(at_target);
  } else {
    losses.divergence = divergence_pass<M, true, false>(g, row, softmax_row);
  }
  return losses;
}

// A segment that does not fill a vector takes fewer steps one score at a time.
constexpr int64_t kShort = 16;

template <typename M, typename S> inline Losses<typename M::Scalar> segment_losses(const Segment<S>& g) {
  if constexpr (M::kLanes > 1) {
    if (g.length <= kShort) return segment_losses<ScalarMachine<Real<S>>>(g);
  }
  if (!g.y) return softmax_losses<M>(g);
  return g.smoothing == typename M::Scalar(0) ? pair_losses<M, false>(g) : pair_losses<M, true>(g);
}

}  // namespace SETT_CPU_ISA
}  // namespace sett
