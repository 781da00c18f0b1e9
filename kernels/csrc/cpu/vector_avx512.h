// Owns: vectors of 16 floats for AVX-512 (F, BW, DQ, VL): arithmetic, loads and stores of every storage type, exp.
#pragma once

#include <immintrin.h>

#include "polynomial.h"
#include "storage.h"

namespace sett {
namespace SETT_CPU_ISA {

struct Mask { __mmask16 bits; };

struct Vector {
  __m512 v;
  Vector() = default;
  SETT_INLINE Vector(__m512 x) : v(x) {}
  SETT_INLINE explicit Vector(float x) : v(_mm512_set1_ps(x)) {}
};

SETT_INLINE Vector operator+(Vector a, Vector b) { return _mm512_add_ps(a.v, b.v); }
SETT_INLINE Vector operator-(Vector a, Vector b) { return _mm512_sub_ps(a.v, b.v); }
SETT_INLINE Vector operator*(Vector a, Vector b) { return _mm512_mul_ps(a.v, b.v); }
SETT_INLINE Vector operator-(Vector a) { return _mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f)); }
SETT_INLINE Mask operator==(Vector a, Vector b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
SETT_INLINE Mask operator<=(Vector a, Vector b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
SETT_INLINE Vector select(Mask m, Vector a, Vector b) { return _mm512_mask_blend_ps(m.bits, b.v, a.v); }
// b if either is NaN, as a > b ? a : b has it.
SETT_INLINE Vector maximum(Vector a, Vector b) { return _mm512_max_ps(a.v, b.v); }
SETT_INLINE Vector magnitude(Vector a) { return _mm512_abs_ps(a.v); }

struct VectorMachine {
  using Scalar = float;
  using Vector = SETT_CPU_ISA::Vector;
  static constexpr int kLanes = 16;
  static constexpr int kRows = 4;
  static constexpr int kColumns = 4;
  static constexpr int kSolo = 8;

  static SETT_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static SETT_INLINE Vector from_brain(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static SETT_INLINE __m256i to_brain(Vector x) {
    const __m512i u = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
  static SETT_INLINE __m256i to_half(Vector x) {
    return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  static SETT_INLINE Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static SETT_INLINE Vector load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static SETT_INLINE Vector load(const Brain* p) {
    return from_brain(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static SETT_INLINE Vector load_first(const float* p, int64_t n, Vector fill) {
    return _mm512_mask_loadu_ps(fill.v, first(n), p);
  }
  static SETT_INLINE Vector load_first(const Half* p, int64_t n, Vector fill) {
    return _mm512_mask_mov_ps(fill.v, first(n), _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)));
  }
  static SETT_INLINE Vector load_first(const Brain* p, int64_t n, Vector fill) {
    return _mm512_mask_mov_ps(fill.v, first(n), from_brain(_mm256_maskz_loadu_epi16(first(n), p)).v);
  }
  static SETT_INLINE void store(float* p, Vector x) { _mm512_storeu_ps(p, x.v); }
  static SETT_INLINE void store(Half* p, Vector x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_half(x));
  }
  static SETT_INLINE void store(Brain* p, Vector x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_brain(x));
  }
  static SETT_INLINE void store_first(float* p, int64_t n, Vector x) { _mm512_mask_storeu_ps(p, first(n), x.v); }
  static SETT_INLINE void store_first(Half* p, int64_t n, Vector x) {
    _mm256_mask_storeu_epi16(p, first(n), to_half(x));
  }
  static SETT_INLINE void store_first(Brain* p, int64_t n, Vector x) {
    _mm256_mask_storeu_epi16(p, first(n), to_brain(x));
  }

  static SETT_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
  static SETT_INLINE bool any_above(Vector a, Vector b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
  static SETT_INLINE float sum(Vector x) { return _mm512_reduce_add_ps(x.v); }
  static SETT_INLINE float largest(Vector x) { return _mm512_reduce_max_ps(x.v); }
  static SETT_INLINE void sum_four(const Vector (&x)[4], float* out) {
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0].v, x[1].v), _mm512_unpackhi_ps(x[0].v, x[1].v));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2].v, x[3].v), _mm512_unpackhi_ps(x[2].v, x[3].v));
    const __m512 c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1)));
  }
};

// x = n ln 2 + r. The operand order of the clamp keeps NaN; clamped lanes come out as 0 and inf.
SETT_INLINE void reduce(Vector x, Vector& n, Vector& r) {
  const Vector c = maximum(Vector(kExpLowest), x);
  const Vector clamped = _mm512_min_ps(_mm512_set1_ps(kExpHighest), c.v);
  const Vector magic(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  n = VectorMachine::multiply_add(clamped, Vector(kLog2E), magic) - magic;
  r = VectorMachine::multiply_add(n, Vector(-kLn2High), clamped);
  r = VectorMachine::multiply_add(n, Vector(-kLn2Low), r);
}

SETT_INLINE Vector exponential(Vector x) {
  Vector n, r;
  reduce(x, n, r);
  Vector p = VectorMachine::multiply_add(series_tail<VectorMachine>(r), r, Vector(1.0f));
  p = VectorMachine::multiply_add(p, r, Vector(1.0f));
  return _mm512_scalef_ps(p.v, n.v);
}

SETT_INLINE Vector exponential_minus_one(Vector x) {
  Vector n, r;
  reduce(x, n, r);
  const Vector q = VectorMachine::multiply_add(series_tail<VectorMachine>(r), r * r, r);
  // Half of 2^n, which itself may overflow where the result does not.
  const Vector half = _mm512_scalef_ps(_mm512_set1_ps(0.5f), n.v);
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
