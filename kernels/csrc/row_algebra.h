// The arithmetic of every loss, once, for host and device.
//
// Owns: what is accumulated over a segment in one pass (`SoftmaxState`, `DivergenceState`), how two accumulations
// merge, and what a score's gradient is once they are complete. Loops, lanes, shared memory and vectors are the
// callers' business: `T` is float or double on the device and in scalar code, and a SIMD vector of floats on the CPU,
// with one lane's state in each lane.
//
// Over a vector type the callers provide, where argument-dependent lookup finds them: arithmetic operators, comparisons
// that give masks, exponential, exponential_minus_one, maximum, magnitude, select(mask, a, b), a constructor from float,
// and `Limits`. The scalar forms are below.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define SETT_HD __host__ __device__ __forceinline__
#else
#define SETT_HD inline
#endif

namespace sett {
namespace algebra {

SETT_HD float exponential(float x) { return expf(x); }
SETT_HD double exponential(double x) { return exp(x); }
SETT_HD float exponential_minus_one(float x) { return expm1f(x); }
SETT_HD double exponential_minus_one(double x) { return expm1(x); }
SETT_HD float log_one_plus(float x) { return log1pf(x); }
SETT_HD double log_one_plus(double x) { return log1p(x); }
SETT_HD float logarithm(float x) { return logf(x); }
SETT_HD double logarithm(double x) { return log(x); }
SETT_HD float maximum(float a, float b) { return a > b ? a : b; }
SETT_HD double maximum(double a, double b) { return a > b ? a : b; }
SETT_HD float magnitude(float a) { return fabsf(a); }
SETT_HD double magnitude(double a) { return fabs(a); }
SETT_HD float select(bool c, float a, float b) { return c ? a : b; }
SETT_HD double select(bool c, double a, double b) { return c ? a : b; }

template <typename T> struct Limits;
template <> struct Limits<float> { static SETT_HD float lowest() { return -INFINITY; } };
template <> struct Limits<double> { static SETT_HD double lowest() { return -(double)INFINITY; } };

// exp(a - top), and 0 where a is -inf, whatever top is (-inf - -inf would be NaN).
template <typename T> SETT_HD T shifted_exponential(T a, T top) {
  return select(a == Limits<T>::lowest(), T(0), exponential(a - top));
}

// ---------------------------------------------------------------------------------------------------------------------
// Softmax of one segment, its target left out of `rest`: with rest apart, a loss of 1e-9 keeps its digits, and so does
// the gradient p - 1 of a target with p near 1.

template <typename T> struct SoftmaxState {
  T top;     // largest score so far, the target's included
  T rest;    // sum of exp(score - top) over the scores but the target's
  T linear;  // sum of (score - anchor) over all scores, for label smoothing
};

// The anchor is any number of the size of the scores, the same for all of a segment: it keeps the digits of `linear`
// under a common offset of the scores.
template <typename T> SETT_HD T softmax_anchor(T target_score) {
  return magnitude(target_score) < -Limits<T>::lowest() ? target_score : T(0);
}

template <typename T> SETT_HD SoftmaxState<T> softmax_start() { return {Limits<T>::lowest(), T(0), T(0)}; }

// Take in the score x, which is not the target's.
template <typename T> SETT_HD void softmax_add(SoftmaxState<T>& s, T x, T anchor) {
  const T top = maximum(s.top, x);
  s.rest = s.rest * shifted_exponential(s.top, top) + shifted_exponential(x, top);
  s.linear = s.linear + (x - anchor);
  s.top = top;
}

// Take in the target's score.
template <typename T> SETT_HD void softmax_add_target(SoftmaxState<T>& s, T x, T anchor) {
  const T top = maximum(s.top, x);
  s.rest = s.rest * shifted_exponential(s.top, top);
  s.linear = s.linear + (x - anchor);
  s.top = top;
}

template <typename T> SETT_HD SoftmaxState<T> softmax_merge(SoftmaxState<T> a, SoftmaxState<T> b) {
  const T top = maximum(a.top, b.top);
  return {top, a.rest * shifted_exponential(a.top, top) + b.rest * shifted_exponential(b.top, top), a.linear + b.linear};
}

// What the gradient of a segment needs beside the score itself; scalar, the same for all of the segment.
template <typename T> struct SoftmaxRow {
  T loss;         // cross-entropy, smoothing and z-loss included, without the weight
  T top;          // largest score
  T per_weight;   // a score's exp(x - top) times this is its share of the gradient, the weight included
  T uniform;      // what label smoothing takes off every score's gradient, the weight included
  T at_target;    // the whole gradient of the target's score
};

// z: the target's score; n: scores in the segment; smoothing s mixes in the uniform distribution as fairseq and PyTorch
// do: (1 - s) * nll + s * mean over the segment of -log p. z_loss adds z_loss * lse^2.
template <typename T>
SETT_HD SoftmaxRow<T> softmax_finish(SoftmaxState<T> s, T z, T n, T weight, T smoothing, T z_loss) {
  SoftmaxRow<T> row;
  const T mine = shifted_exponential(z, s.top);
  const T whole = s.rest + mine;
  // log(whole) by log1p of what exceeds 1: the target is the largest score in the case that needs the digits.
  const T log_whole = log_one_plus(s.rest + exponential_minus_one(z - s.top));
  const T lse = s.top + log_whole;
  row.loss = log_whole + (s.top - z);
  if (smoothing != T(0)) {
    const T uniform = log_whole + (s.top - softmax_anchor(z)) - s.linear / n;  // mean of -log p
    row.loss = row.loss * (T(1) - smoothing) + smoothing * uniform;
  }
  row.loss = row.loss + z_loss * lse * lse;
  const T extra = T(2) * z_loss * lse;  // z-loss adds p * extra to each score's gradient
  row.top = s.top;
  row.per_weight = weight * (T(1) + extra) / whole;
  row.uniform = weight * smoothing / n;
  row.at_target = weight * ((mine * extra - s.rest) / whole + smoothing - smoothing / n);
  return row;
}

// The gradient of a score that is not the target's.
template <typename T, typename V> SETT_HD V softmax_gradient(const SoftmaxRow<T>& row, V x) {
  return shifted_exponential(x, V(row.top)) * V(row.per_weight) - V(row.uniform);
}

// ---------------------------------------------------------------------------------------------------------------------
// J = KL(p || q) + KL(q || p) for p = softmax(x), q = softmax(y), d = x - y.
//
// The textbook difference of two log-softmaxes loses all digits when x and y differ by R3F's 1e-5. Termwise:
//   c = lse(x) - lse(y) = -log1p(sum p * expm1(-d)),   t = d - c = log p - log q,   p - q = -p * expm1(-t),
//   J = sum (p - q) * t,   dJ/dx = p * (t - KL(p||q)) + (p - q),   dJ/dy = q * (-t - KL(q||p)) - (p - q).
// That c is used while |c| <= 1 and no score differs by more than kNear, beyond which expm1(-d) may overflow; else the
// plain difference of the two log-sum-exps is as good.

constexpr float kNear = 16.0f;

template <typename T> struct DivergenceState {
  T top_x, sum_x;  // softmax of x: largest score, sum of exp(x - top_x)
  T top_y, sum_y;  // softmax of y
  T lift;          // sum of exp(x - top_x) * expm1(-d), for |d| <= kNear
  T mean_x;        // sum of exp(x - top_x) * d
  T mean_y;        // sum of exp(y - top_y) * d
  T spread;        // largest |d|
};

template <typename T> SETT_HD DivergenceState<T> divergence_start() {
  const T low = Limits<T>::lowest();
  return {low, T(0), low, T(0), T(0), T(0), T(0), T(0)};
}

// x - y, and 0 where both are -inf: such a score has p = q = 0 and takes no part.
template <typename T> SETT_HD T score_difference(T x, T y) { return select(x == y, T(0), x - y); }

template <typename T> SETT_HD void divergence_add(DivergenceState<T>& s, T x, T y) {
  const T d = score_difference(x, y);
  const T top_x = maximum(s.top_x, x), top_y = maximum(s.top_y, y);
  const T keep_x = shifted_exponential(s.top_x, top_x), keep_y = shifted_exponential(s.top_y, top_y);
  const T e_x = shifted_exponential(x, top_x), e_y = shifted_exponential(y, top_y);
  const T size = magnitude(d);
  // A score of p = 0 adds nothing, though d may be infinite there.
  s.lift = s.lift * keep_x + select(size <= T(kNear), e_x * exponential_minus_one(-d), T(0));
  s.mean_x = s.mean_x * keep_x + select(e_x == T(0), T(0), e_x * d);
  s.mean_y = s.mean_y * keep_y + select(e_y == T(0), T(0), e_y * d);
  s.sum_x = s.sum_x * keep_x + e_x;
  s.sum_y = s.sum_y * keep_y + e_y;
  s.top_x = top_x;
  s.top_y = top_y;
  s.spread = maximum(s.spread, size);
}

template <typename T> SETT_HD DivergenceState<T> divergence_merge(DivergenceState<T> a, DivergenceState<T> b) {
  DivergenceState<T> s;
  s.top_x = maximum(a.top_x, b.top_x);
  s.top_y = maximum(a.top_y, b.top_y);
  const T ax = shifted_exponential(a.top_x, s.top_x), bx = shifted_exponential(b.top_x, s.top_x);
  const T ay = shifted_exponential(a.top_y, s.top_y), by = shifted_exponential(b.top_y, s.top_y);
  s.sum_x = a.sum_x * ax + b.sum_x * bx;
  s.sum_y = a.sum_y * ay + b.sum_y * by;
  s.lift = a.lift * ax + b.lift * bx;
  s.mean_x = a.mean_x * ax + b.mean_x * bx;
  s.mean_y = a.mean_y * ay + b.mean_y * by;
  s.spread = maximum(a.spread, b.spread);
  return s;
}

template <typename T> struct DivergenceRow {
  T top_x, scale_x;  // p = exp(x - top_x) * scale_x
  T top_y, scale_y;  // q = exp(y - top_y) * scale_y
  T shift;           // c
  T kl_xy, kl_yx;    // KL(p || q), KL(q || p), good enough for gradients; J itself is summed termwise
};

template <typename T> SETT_HD DivergenceRow<T> divergence_finish(DivergenceState<T> s) {
  DivergenceRow<T> row;
  row.top_x = s.top_x;
  row.top_y = s.top_y;
  row.scale_x = T(1) / s.sum_x;
  row.scale_y = T(1) / s.sum_y;
  const T near = -log_one_plus(s.lift / s.sum_x);
  const T far = (s.top_x - s.top_y) + (logarithm(s.sum_x) - logarithm(s.sum_y));
  row.shift = s.spread <= T(kNear) && magnitude(near) <= T(1) ? near : far;
  row.kl_xy = s.mean_x / s.sum_x - row.shift;
  row.kl_yx = row.shift - s.mean_y / s.sum_y;
  return row;
}

template <typename V> struct DivergenceTerm {
  V value;            // the score's part of J
  V grad_x, grad_y;   // dJ/dx, dJ/dy at this score, without the weight
};

template <typename T, typename V> SETT_HD DivergenceTerm<V> divergence_term(const DivergenceRow<T>& row, V x, V y) {
  const V p = shifted_exponential(x, V(row.top_x)) * V(row.scale_x);
  const V q = shifted_exponential(y, V(row.top_y)) * V(row.scale_y);
  const V t = score_difference(x, y) - V(row.shift);
  // p - q = -p * expm1(-t) keeps the digits where t is small; where it is large the plain difference has them.
  const V gap = select(magnitude(t) <= V(T(1)), V(T(0)) - p * exponential_minus_one(V(T(0)) - t), p - q);
  DivergenceTerm<V> term;
  // A score of p = q = 0 has no part; one of p = 0 alone has t = -inf and J = inf, and says so.
  term.value = select(gap == V(T(0)), V(T(0)), gap * t);
  term.grad_x = select(p == V(T(0)), V(T(0)), p * (t - V(row.kl_xy))) + gap;
  term.grad_y = select(q == V(T(0)), V(T(0)), q * (V(T(0)) - t - V(row.kl_yx))) - gap;
  return term;
}

// ---------------------------------------------------------------------------------------------------------------------
// Squared error of one prediction, and its gradient with the weight.

template <typename T> SETT_HD T squared_error(T prediction, T value) {
  return (prediction - value) * (prediction - value);
}
template <typename T> SETT_HD T squared_error_gradient(T prediction, T value, T weight) {
  return T(2) * weight * (prediction - value);
}

}  // namespace algebra
}  // namespace sett
