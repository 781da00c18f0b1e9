// Owns: vectors of 8 floats for AVX2 with FMA and F16C: arithmetic, loads and stores of every storage type, exp.
#pragma once

#include <immintrin.h>

#include "polynomial.h"
#include "storage.h"

namespace sett {
namespace SETT_CPU_ISA {

struct Mask { __m256 bits; };

struct Vector {
  __m256 v;
  Vector() = default;
  SETT_INLINE Vector(__m256 x) : v(x) {}
  SETT_INLINE explicit Vector(float x) : v(_mm256_set1_ps(x)) {}
};

SETT_INLINE Vector operator+(Vector a, Vector b) { return _mm256_add_ps(a.v, b.v); }
SETT_INLINE Vector operator-(Vector a, Vector b) { return _mm256_sub_ps(a.v, b.v); }
SETT_INLINE Vector operator*(Vector a, Vector b) { return _mm256_mul_ps(a.v, b.v); }
SETT_INLINE Vector operator-(Vector a) { return _mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f)); }
SETT_INLINE Mask operator==(Vector a, Vector b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
SETT_INLINE Mask operator<=(Vector a, Vector b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
SETT_INLINE Vector select(Mask m, Vector a, Vector b) { return _mm256_blendv_ps(b.v, a.v, m.bits); }
// b if either is NaN, as a > b ? a : b has it.
SETT_INLINE Vector maximum(Vector a, Vector b) { return _mm256_max_ps(a.v, b.v); }
SETT_INLINE Vector magnitude(Vector a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }

struct VectorMachine {
  using Scalar = float;
  using Vector = SETT_CPU_ISA::Vector;
  static constexpr int kLanes = 8;
  static constexpr int kRows = 2;  // 16 registers
  static constexpr int kColumns = 4;
  static constexpr int kSolo = 8;

  static SETT_INLINE __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static SETT_INLINE Vector from_brain(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static SETT_INLINE __m128i to_brain(Vector x) {
    const __m256i u = _mm256_castps_si256(x.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i even = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
    const __m256i rounded = _mm256_srli_epi32(_mm256_blendv_epi8(even, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  static SETT_INLINE __m128i to_half(Vector x) {
    return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // There are no masked loads of 16-bit numbers: the last few of a run go through a buffer.
  static SETT_INLINE __m128i load_sixteen(const void* p, int64_t n) {
    alignas(16) uint16_t buffer[8] = {};
    memcpy(buffer, p, static_cast<size_t>(n) * 2);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
  }
  static SETT_INLINE void store_sixteen(void* p, int64_t n, __m128i bits) {
    alignas(16) uint16_t buffer[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(buffer), bits);
    memcpy(p, buffer, static_cast<size_t>(n) * 2);
  }
  static SETT_INLINE Vector keep_first(Vector x, int64_t n, Vector fill) {
    return _mm256_blendv_ps(fill.v, x.v, _mm256_castsi256_ps(first(n)));
  }

  static SETT_INLINE Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static SETT_INLINE Vector load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static SETT_INLINE Vector load(const Brain* p) {
    return from_brain(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static SETT_INLINE Vector load_first(const float* p, int64_t n, Vector fill) {
    return keep_first(_mm256_maskload_ps(p, first(n)), n, fill);
  }
  static SETT_INLINE Vector load_first(const Half* p, int64_t n, Vector fill) {
    return keep_first(_mm256_cvtph_ps(load_sixteen(p, n)), n, fill);
  }
  static SETT_INLINE Vector load_first(const Brain* p, int64_t n, Vector fill) {
    return keep_first(from_brain(load_sixteen(p, n)), n, fill);
  }
  static SETT_INLINE void store(float* p, Vector x) { _mm256_storeu_ps(p, x.v); }
  static SETT_INLINE void store(Half* p, Vector x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_half(x)); }
  static SETT_INLINE void store(Brain* p, Vector x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_brain(x)); }
  static SETT_INLINE void store_first(float* p, int64_t n, Vector x) { _mm256_maskstore_ps(p, first(n), x.v); }
  static SETT_INLINE void store_first(Half* p, int64_t n, Vector x) { store_sixteen(p, n, to_half(x)); }
  static SETT_INLINE void store_first(Brain* p, int64_t n, Vector x) { store_sixteen(p, n, to_brain(x)); }

  static SETT_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
  static SETT_INLINE bool any_above(Vector a, Vector b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)) != 0;
  }
  static SETT_INLINE float sum(Vector x) {
    const __m128 a = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    const __m128 b = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
  }
  static SETT_INLINE float largest(Vector x) {
    const __m128 a = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    const __m128 b = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
  }
  static SETT_INLINE void sum_four(const Vector (&x)[4], float* out) {
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0].v, x[1].v), _mm256_hadd_ps(x[2].v, x[3].v));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)));
  }
};

// x = n ln 2 + r. The operand order of the clamp keeps NaN; clamped lanes come out as 0 and inf.
SETT_INLINE void reduce(Vector x, Vector& n, Vector& r) {
  const Vector c = maximum(Vector(kExpLowest), x);
  const Vector clamped = _mm256_min_ps(_mm256_set1_ps(kExpHighest), c.v);
  const Vector magic(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  n = VectorMachine::multiply_add(clamped, Vector(kLog2E), magic) - magic;
  r = VectorMachine::multiply_add(n, Vector(-kLn2High), clamped);
  r = VectorMachine::multiply_add(n, Vector(-kLn2Low), r);
}

// x * 2^n for whole n from -150 to 128, in two factors so that each is a normal number.
SETT_INLINE Vector scale_by_power(Vector x, Vector n) {
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  const __m256i other = _mm256_sub_epi32(whole, half);
  const Vector a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const Vector b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(other, bias), 23));
  return x * a * b;
}

SETT_INLINE Vector exponential(Vector x) {
  Vector n, r;
  reduce(x, n, r);
  Vector p = VectorMachine::multiply_add(series_tail<VectorMachine>(r), r, Vector(1.0f));
  p = VectorMachine::multiply_add(p, r, Vector(1.0f));
  return scale_by_power(p, n);
}

SETT_INLINE Vector exponential_minus_one(Vector x) {
  Vector n, r;
  reduce(x, n, r);
  const Vector q = VectorMachine::multiply_add(series_tail<VectorMachine>(r), r * r, r);
  // Half of 2^n, which itself may overflow where the result does not.
  const Vector half = scale_by_power(Vector(0.5f), n);
  const Vector result = VectorMachine::multiply_add(half, q, half - Vector(0.5f));
  return result + result;
}

}  // namespace SETT_CPU_ISA

namespace algebra {
template <> struct Limits<SETT_CPU_ISA::Vector> {
  static SETT_INLINE SETT_CPU_ISA::Vector lowest() { return SETT_CPU_ISA::Vector(-INFINITY); }
};
}  // namespace algebra
}  // namespace sett
