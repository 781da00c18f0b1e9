// Owns: the accumulations of row_algebra.h in steps that suit vectors: raise the largest score of a state once for many
// scores, then take those in without a rescaling, and fold the lanes of a state into one.
#pragma once

#include "vector_scalar.h"

namespace sett {
namespace SETT_CPU_ISA {

using algebra::DivergenceState;
using algebra::SoftmaxState;

// All lanes of a state have the same largest score: a rise in one lane raises all. It makes rises rare, about the
// logarithm of the number of scores, and folding the lanes a plain sum.
template <typename M> SETT_INLINE typename M::Vector raised_top(typename M::Vector top, typename M::Vector x) {
  return typename M::Vector(M::largest(maximum(top, x)));
}

template <typename V> SETT_INLINE void softmax_raise(SoftmaxState<V>& s, V top) {
  s.rest = s.rest * algebra::shifted_exponential(s.top, top);
  s.top = top;
}

template <typename V> SETT_INLINE void divergence_raise_x(DivergenceState<V>& s, V top) {
  const V keep = algebra::shifted_exponential(s.top_x, top);
  s.sum_x = s.sum_x * keep;
  s.lift = s.lift * keep;
  s.mean_x = s.mean_x * keep;
  s.top_x = top;
}

template <typename V> SETT_INLINE void divergence_raise_y(DivergenceState<V>& s, V top) {
  const V keep = algebra::shifted_exponential(s.top_y, top);
  s.sum_y = s.sum_y * keep;
  s.mean_y = s.mean_y * keep;
  s.top_y = top;
}

// divergence_add for scores that are known not to exceed top_x and top_y.
template <typename V> SETT_INLINE void divergence_take(DivergenceState<V>& s, V x, V y) {
  const V zero(0.0f);
  const V d = algebra::score_difference(x, y), size = magnitude(d);
  const V e_x = algebra::shifted_exponential(x, s.top_x), e_y = algebra::shifted_exponential(y, s.top_y);
  s.lift = s.lift + select(size <= V(algebra::kNear), e_x * exponential_minus_one(-d), zero);
  s.mean_x = s.mean_x + select(e_x == zero, zero, e_x * d);
  s.mean_y = s.mean_y + select(e_y == zero, zero, e_y * d);
  s.sum_x = s.sum_x + e_x;
  s.sum_y = s.sum_y + e_y;
  s.spread = maximum(s.spread, size);
}

template <typename M> SETT_INLINE SoftmaxState<typename M::Scalar> fold(const SoftmaxState<typename M::Vector>& s) {
  return {M::largest(s.top), M::sum(s.rest), M::sum(s.linear)};
}

template <typename M>
SETT_INLINE DivergenceState<typename M::Scalar> fold(const DivergenceState<typename M::Vector>& s) {
  return {M::largest(s.top_x), M::sum(s.sum_x), M::largest(s.top_y), M::sum(s.sum_y),
          M::sum(s.lift),      M::sum(s.mean_x), M::sum(s.mean_y),    M::largest(s.spread)};
}

}  // namespace SETT_CPU_ISA
}  // namespace sett
