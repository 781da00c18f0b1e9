// Owns: the polynomial behind the vector exponentials.
//
// exp(r) = 1 + r + r^2 P(r) for |r| <= ln(2) / 2, with P minimax for the absolute error r^2 P(r), 3e-9: a twentieth of
// an ulp. expm1(r) = r + r^2 P(r) keeps its digits near 0. ln(2) is split so that n * kLn2High is exact.
#pragma once

#include "storage.h"

namespace sett {
namespace SETT_CPU_ISA {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
constexpr float kP0 = 0.5f, kP1 = 0x1.55548ep-3f, kP2 = 0x1.55545ep-5f, kP3 = 0x1.123b92p-7f, kP4 = 0x1.6db48p-10f;
// exp is 0 below the first and inf above the second.
constexpr float kExpLowest = -104.0f, kExpHighest = 89.0f;

template <typename M> SETT_INLINE typename M::Vector series_tail(typename M::Vector r) {  // P(r)
  using V = typename M::Vector;
  V p = M::multiply_add(V(kP4), r, V(kP3));
  p = M::multiply_add(p, r, V(kP2));
  p = M::multiply_add(p, r, V(kP1));
  return M::multiply_add(p, r, V(kP0));
}

}  // namespace SETT_CPU_ISA
}  // namespace sett
