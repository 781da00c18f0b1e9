// A float whose exponentials cost one special-function instruction.
//
// Owns: `FastFloat`, the arithmetic of single scores stored in 16 bits. exp(t) is 2^(t log2 e) with one rounding before
// the exponent: a relative error of about (2 + |t|) 2^-24, far below the 2^-9 or 2^-12 of the storage, and smallest for
// the scores that count. fp32 storage uses expf, fp64 exp. Row scalars (logarithms, divisions) stay in plain float.
#pragma once

#include <cuda_runtime.h>

#include "../row_algebra.h"

namespace sett {
namespace cuda {

struct FastFloat {
  float value;
  FastFloat() = default;
  SETT_HD explicit FastFloat(float v) : value(v) {}
};

__device__ __forceinline__ FastFloat operator+(FastFloat a, FastFloat b) { return FastFloat(a.value + b.value); }
__device__ __forceinline__ FastFloat operator-(FastFloat a, FastFloat b) { return FastFloat(a.value - b.value); }
__device__ __forceinline__ FastFloat operator*(FastFloat a, FastFloat b) { return FastFloat(a.value * b.value); }
__device__ __forceinline__ FastFloat operator-(FastFloat a) { return FastFloat(-a.value); }
__device__ __forceinline__ bool operator==(FastFloat a, FastFloat b) { return a.value == b.value; }
__device__ __forceinline__ bool operator<=(FastFloat a, FastFloat b) { return a.value <= b.value; }

__device__ __forceinline__ FastFloat select(bool c, FastFloat a, FastFloat b) {
  return FastFloat(c ? a.value : b.value);
}
__device__ __forceinline__ FastFloat magnitude(FastFloat a) { return FastFloat(fabsf(a.value)); }

constexpr float kLog2E = 1.4426950408889634f;

// 2^x in one MUFU instruction, 2 ulp; subnormal results are flushed, which no 16-bit gradient can tell.
__device__ __forceinline__ float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// As the template of row_algebra.h, but the case of -inf - -inf is taken out of the top: that is the same for all
// scores of a loop, and so costs nothing per score.
__device__ __forceinline__ FastFloat shifted_exponential(FastFloat a, FastFloat top) {
  const float finite_top = top.value == -INFINITY ? 0.0f : top.value;
  return FastFloat(power_of_two((a.value - finite_top) * kLog2E));
}

// A Taylor polynomial where the plain difference would cancel; at |a| = 1/4 both are good to 4e-7.
__device__ __forceinline__ FastFloat exponential_minus_one(FastFloat a) {
  const float x = a.value;
  float series = fmaf(x, 1.0f / 720.0f, 1.0f / 120.0f);
  series = fmaf(series, x, 1.0f / 24.0f);
  series = fmaf(series, x, 1.0f / 6.0f);
  series = fmaf(series, x, 0.5f);
  series = fmaf(series * x, x, x);
  return FastFloat(fabsf(x) <= 0.25f ? series : power_of_two(x * kLog2E) - 1.0f);
}

__device__ __forceinline__ float raw(FastFloat a) { return a.value; }
__device__ __forceinline__ float raw(float a) { return a; }
__device__ __forceinline__ double raw(double a) { return a; }

}  // namespace cuda
}  // namespace sett
