// Owns: the "vector" of one lane, a plain float or double, and the operations the kernels need of vectors. The generic
// kernels use nothing else, the others use it for short segments.
//
// This is also where those operations are described; vector_avx2.h and vector_avx512.h have the same.
#pragma once

#include "storage.h"

namespace sett {
namespace SETT_CPU_ISA {

// What argument-dependent lookup finds for the vector types.
using algebra::exponential_minus_one;
using algebra::magnitude;
using algebra::maximum;
using algebra::select;

template <typename T> struct ScalarMachine {
  using Scalar = T;
  using Vector = T;
  static constexpr int kLanes = 1;
  static constexpr int kRows = 2;     // of a register block: rows by 4 columns of vectors in matrix products,
  static constexpr int kColumns = 4;  // rows by kColumns in sums of rows
  static constexpr int kSolo = 8;     // columns of a block of one row

  // Reads kLanes numbers; load_first reads n < kLanes, and nothing after them, and sets the other lanes to `fill`.
  template <typename S> static SETT_INLINE T load(const S* p) { return widen(*p); }
  template <typename S> static SETT_INLINE T load_first(const S*, int64_t, T fill) { return fill; }
  template <typename S> static SETT_INLINE void store(S* p, T v) { *p = narrow<S>(v); }
  template <typename S> static SETT_INLINE void store_first(S*, int64_t, T) {}

  static SETT_INLINE T multiply_add(T a, T b, T c) { return a * b + c; }
  static SETT_INLINE bool any_above(T a, T b) { return a > b; }
  static SETT_INLINE T sum(T v) { return v; }
  static SETT_INLINE T largest(T v) { return v; }
  static SETT_INLINE void sum_four(const T (&v)[4], T* out) {  // the sum of each
    for (int i = 0; i < 4; ++i) out[i] = v[i];
  }
};

}  // namespace SETT_CPU_ISA
}  // namespace sett
