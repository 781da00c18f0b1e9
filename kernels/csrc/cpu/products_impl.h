// Owns: the register-blocked products of the small heads: rows times rows (scores), weighted sums of rows (gradients).
#pragma once

#include "storage.h"

namespace sett {
namespace SETT_CPU_ISA {

constexpr int kDotColumns = 4;          // rows of the second factor in a block
constexpr int64_t kVectorsPerDot = 64;  // partial sums that long are added up, which bounds their rounding errors

// out[i * kDotColumns + j] += a[i] . b[j] over n numbers.
template <typename M, int I, int J, typename S>
SETT_INLINE void dot_range(const S* const* a, const S* const* b, int64_t from, int64_t to, typename M::Scalar* out) {
  using V = typename M::Vector;
  using R = typename M::Scalar;
  V sum[I][kDotColumns];
  for (int i = 0; i < I; ++i) {
    for (int j = 0; j < kDotColumns; ++j) sum[i][j] = V(R(0));
  }
  int64_t k = from;
  for (; k + M::kLanes <= to; k += M::kLanes) {
    V right[J];
    for (int j = 0; j < J; ++j) right[j] = M::load(b[j] + k);
    for (int i = 0; i < I; ++i) {
      const V left = M::load(a[i] + k);
      for (int j = 0; j < J; ++j) sum[i][j] = M::multiply_add(left, right[j], sum[i][j]);
    }
  }
  if (k < to) {
    for (int i = 0; i < I; ++i) {
      const V left = M::load_first(a[i] + k, to - k, V(R(0)));
      for (int j = 0; j < J; ++j) {
        sum[i][j] = M::multiply_add(left, M::load_first(b[j] + k, to - k, V(R(0))), sum[i][j]);
      }
    }
  }
  for (int i = 0; i < I; ++i) {
    R four[kDotColumns];
    M::sum_four(sum[i], four);
    for (int j = 0; j < J; ++j) out[i * kDotColumns + j] += four[j];
  }
}

template <typename M, int I, int J, typename S>
inline void dot_block(const S* const* a, const S* const* b, int64_t n, typename M::Scalar* out) {
  constexpr int64_t step = kVectorsPerDot * M::kLanes;
  for (int i = 0; i < I * kDotColumns; ++i) out[i] = typename M::Scalar(0);
  for (int64_t k = 0; k < n; k += step) dot_range<M, I, J>(a, b, k, smaller(n, k + step), out);
}

// The same for rows <= I and columns <= J.
template <typename M, int I, int J, typename S>
inline void dot_products(int64_t rows, int64_t columns, const S* const* a, const S* const* b, int64_t n,
                         typename M::Scalar* out) {
  if constexpr (I > 1) {
    if (rows < I) return dot_products<M, I - 1, J>(rows, columns, a, b, n, out);
  }
  if constexpr (J > 1) {
    if (columns < J) return dot_products<M, I, J - 1>(rows, columns, a, b, n, out);
  }
  dot_block<M, I, J>(a, b, n, out);
}

// ---------------------------------------------------------------------------------------------------------------------
// I sums at once over the same rows, each with its own coefficients. A Source has
//   template <int I, int C, bool kPart> void add(V (&sum)[I][C], int64_t column, int64_t part) const
// which calls add_row for each of its rows; C vectors from `column` on, or with kPart the first `part` lanes of one.

template <typename M, int I, int C, bool kPart, typename S>
SETT_INLINE void add_row(typename M::Vector (&sum)[I][C], const typename M::Scalar (&coefficient)[I], const S* row,
                         int64_t part) {
  using V = typename M::Vector;
  for (int c = 0; c < C; ++c) {
    V v;
    if constexpr (kPart) v = M::load_first(row, part, V(typename M::Scalar(0)));
    else v = M::load(row + c * M::kLanes);
    for (int i = 0; i < I; ++i) sum[i][c] = M::multiply_add(V(coefficient[i]), v, sum[i][c]);
  }
}

template <typename M, int I, int C, bool kPart, typename S, typename Source>
SETT_INLINE void sum_block(const Source& source, int64_t column, int64_t part, S* const* out) {
  using V = typename M::Vector;
  V sum[I][C];
  for (int i = 0; i < I; ++i) {
    for (int c = 0; c < C; ++c) sum[i][c] = V(typename M::Scalar(0));
  }
  source.template add<I, C, kPart>(sum, column, part);
  for (int i = 0; i < I; ++i) {
    for (int c = 0; c < C; ++c) {
      if constexpr (kPart) M::store_first(out[i] + column, part, sum[i][c]);
      else M::store(out[i] + column + c * M::kLanes, sum[i][c]);
    }
  }
}

template <typename M, int I, typename S, typename Source>
inline void sum_columns(const Source& source, int64_t from, int64_t to, S* const* out) {
  constexpr int C = I == 1 ? M::kSolo : M::kColumns;
  int64_t column = from;
  for (; column + C * M::kLanes <= to; column += C * M::kLanes) sum_block<M, I, C, false>(source, column, 0, out);
  for (; column + M::kLanes <= to; column += M::kLanes) sum_block<M, I, 1, false>(source, column, 0, out);
  if (column < to) sum_block<M, I, 1, true>(source, column, to - column, out);
}

// The same for rows <= I.
template <typename M, int I, typename S, typename Source>
inline void sum_rows(int64_t rows, const Source& source, int64_t from, int64_t to, S* const* out) {
  if constexpr (I > 1) {
    if (rows < I) return sum_rows<M, I - 1>(rows, source, from, to, out);
  }
  sum_columns<M, I>(source, from, to, out);
}

}  // namespace SETT_CPU_ISA
}  // namespace sett
