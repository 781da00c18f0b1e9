// Owns: the storage types of scores and weights, and how one number of them is read and rounded in plain C++.
//
// Included once per instruction set, see isa.h. The vector files have their own, faster forms; results are the same.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__GNUC__)
#define SETT_INLINE inline __attribute__((always_inline))
#else
#define SETT_INLINE inline
#endif

namespace sett {
namespace SETT_CPU_ISA {

struct Half { uint16_t bits; };   // IEEE binary16
struct Brain { uint16_t bits; };  // bfloat16: the upper half of a binary32

// The type of arithmetic, and of losses, for a storage type.
template <typename S> struct RealOf { using type = float; };
template <> struct RealOf<double> { using type = double; };
template <typename S> using Real = typename RealOf<S>::type;

SETT_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
SETT_INLINE float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

SETT_INLINE float widen(float x) { return x; }
SETT_INLINE double widen(double x) { return x; }
SETT_INLINE float widen(Brain x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
SETT_INLINE float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  if (rest >= 0x0f800000u) return float_of(sign | 0x70000000u | rest);  // inf, NaN
  // A product by 2^112 moves the exponent's bias from 15 to 127; it is exact for subnormals too.
  return float_of(sign | bits_of(float_of(rest) * 0x1p112f));
}

template <typename S> S narrow(Real<S> x);
template <> SETT_INLINE float narrow<float>(float x) { return x; }
template <> SETT_INLINE double narrow<double>(double x) { return x; }
template <> SETT_INLINE Brain narrow<Brain>(float x) {
  const uint32_t u = bits_of(x);
  if (x != x) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <> SETT_INLINE Half narrow<Half>(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, size = u & 0x7fffffffu;
  uint32_t bits;
  if (size > 0x7f800000u) {
    bits = 0x7e00u;
  } else if (size >= 0x477ff000u) {  // 65520 and above round to inf
    bits = 0x7c00u;
  } else if (size < 0x38800000u) {
    // Below 2^-14 the sum with 0.5 rounds to a multiple of 2^-24, the spacing of subnormals.
    bits = bits_of(float_of(size) + 0.5f) - 0x3f000000u;
  } else {
    bits = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | bits)};
}

SETT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SETT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace SETT_CPU_ISA
}  // namespace sett
