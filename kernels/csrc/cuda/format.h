// Storage formats: how scores lie in memory and in 16-byte vectors, and what they are computed in.
//
// Owns: `Format<S>` for float, double, __half and __nv_bfloat16, and the choice of one by `Storage`.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string.h>

#include "../sett.h"
#include "device.h"
#include "fast_float.h"

namespace sett {
namespace cuda {

// The 32-bit word `i` of a vector; `i` is known once the loop around is unrolled.
__device__ __forceinline__ unsigned word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
__device__ __forceinline__ unsigned& word(uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// The same vector, by an XOR with a zero that the compiler does not know. Else it keeps what one loop unpacked for the
// next one, at twice the registers of the scores themselves.
__device__ __forceinline__ uint4 afresh(const uint4& v) {
  const unsigned zero = gridDim.y - 1;  // all grids here have one dimension
  return make_uint4(v.x ^ zero, v.y ^ zero, v.z ^ zero, v.w ^ zero);
}

template <typename Pair> __device__ __forceinline__ unsigned bits_of(Pair pair) {
  unsigned bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
template <typename Pair> __device__ __forceinline__ Pair of_bits(unsigned bits) {
  Pair pair;
  memcpy(&pair, &bits, sizeof(bits));
  return pair;
}

template <typename S> struct Format;

template <> struct Format<float> {
  using Real = float;
  using Arithmetic = float;
  static constexpr int kWidth = 4;
  static constexpr unsigned kLowest = 0xff800000u;  // a word of -inf
  static __device__ __forceinline__ float real(float x) { return x; }
  static __device__ __forceinline__ float stored(float x) { return x; }
  static __device__ __forceinline__ float get(const uint4& v, int i) { return __uint_as_float(word(v, i)); }
  static __device__ __forceinline__ uint4 pack(const float (&x)[4]) {
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
  }
  static __device__ __forceinline__ uint4 lowest() { return make_uint4(kLowest, kLowest, kLowest, kLowest); }
  // Puts scores 2i and 2i + 1 of a vector.
  static __device__ __forceinline__ void put(uint4& v, int i, float a, float b) {
    word(v, 2 * i) = __float_as_uint(a);
    word(v, 2 * i + 1) = __float_as_uint(b);
  }
  // The larger scores of two vectors, place by place.
  static __device__ __forceinline__ uint4 larger_of(const uint4& a, const uint4& b) {
    const float both[4] = {larger(get(a, 0), get(b, 0)), larger(get(a, 1), get(b, 1)), larger(get(a, 2), get(b, 2)),
                           larger(get(a, 3), get(b, 3))};
    return pack(both);
  }
};

template <> struct Format<double> {
  using Real = double;
  using Arithmetic = double;
  static constexpr int kWidth = 2;
  static __device__ __forceinline__ double real(double x) { return x; }
  static __device__ __forceinline__ double stored(double x) { return x; }
  static __device__ __forceinline__ double get(const uint4& v, int i) {
    return __hiloint2double(static_cast<int>(word(v, 2 * i + 1)), static_cast<int>(word(v, 2 * i)));
  }
  static __device__ __forceinline__ uint4 pack(const double (&x)[2]) {
    return make_uint4(static_cast<unsigned>(__double2loint(x[0])), static_cast<unsigned>(__double2hiint(x[0])),
                      static_cast<unsigned>(__double2loint(x[1])), static_cast<unsigned>(__double2hiint(x[1])));
  }
  static __device__ __forceinline__ void put(uint4& v, int, double a, double b) {
    const double both[2] = {a, b};
    v = pack(both);
  }
  static __device__ __forceinline__ uint4 lowest() { return make_uint4(0, 0xfff00000u, 0, 0xfff00000u); }
  static __device__ __forceinline__ uint4 larger_of(const uint4& a, const uint4& b) {
    const double both[2] = {larger(get(a, 0), get(b, 0)), larger(get(a, 1), get(b, 1))};
    return pack(both);
  }
};

template <> struct Format<__half> {
  using Real = float;
  using Arithmetic = FastFloat;
  static constexpr int kWidth = 8;
  static constexpr unsigned kLowest = 0xfc00fc00u;
  static __device__ __forceinline__ float real(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half stored(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ float get(const uint4& v, int i) {
    const unsigned pair = word(v, i / 2);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(i % 2 ? pair >> 16 : pair & 0xffffu)));
  }
  static __device__ __forceinline__ unsigned two(float a, float b) {
    return bits_of(__floats2half2_rn(a, b));
  }
  static __device__ __forceinline__ void put(uint4& v, int i, float a, float b) { word(v, i) = two(a, b); }
  static __device__ __forceinline__ uint4 pack(const float (&x)[8]) {
    return make_uint4(two(x[0], x[1]), two(x[2], x[3]), two(x[4], x[5]), two(x[6], x[7]));
  }
  static __device__ __forceinline__ uint4 lowest() { return make_uint4(kLowest, kLowest, kLowest, kLowest); }
  static __device__ __forceinline__ unsigned larger_two(unsigned a, unsigned b) {
    return bits_of(__hmax2(of_bits<__half2>(a), of_bits<__half2>(b)));
  }
  static __device__ __forceinline__ uint4 larger_of(const uint4& a, const uint4& b) {
    return make_uint4(larger_two(a.x, b.x), larger_two(a.y, b.y), larger_two(a.z, b.z), larger_two(a.w, b.w));
  }
};

template <> struct Format<__nv_bfloat16> {
  using Real = float;
  using Arithmetic = FastFloat;
  static constexpr int kWidth = 8;
  static constexpr unsigned kLowest = 0xff80ff80u;
  static __device__ __forceinline__ float real(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 stored(float x) { return __float2bfloat16_rn(x); }
  // A bf16 is the upper half of a float: one shift or mask each.
  static __device__ __forceinline__ float get(const uint4& v, int i) {
    const unsigned pair = word(v, i / 2);
    return __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
  }
  static __device__ __forceinline__ unsigned two(float a, float b) {
    return bits_of(__floats2bfloat162_rn(a, b));
  }
  static __device__ __forceinline__ void put(uint4& v, int i, float a, float b) { word(v, i) = two(a, b); }
  static __device__ __forceinline__ uint4 pack(const float (&x)[8]) {
    return make_uint4(two(x[0], x[1]), two(x[2], x[3]), two(x[4], x[5]), two(x[6], x[7]));
  }
  static __device__ __forceinline__ uint4 lowest() { return make_uint4(kLowest, kLowest, kLowest, kLowest); }
  static __device__ __forceinline__ unsigned larger_two(unsigned a, unsigned b) {
    return bits_of(__hmax2(of_bits<__nv_bfloat162>(a), of_bits<__nv_bfloat162>(b)));
  }
  static __device__ __forceinline__ uint4 larger_of(const uint4& a, const uint4& b) {
    return make_uint4(larger_two(a.x, b.x), larger_two(a.y, b.y), larger_two(a.z, b.z), larger_two(a.w, b.w));
  }
};

// Calls body(S()) for the storage type, and returns what it returns.
template <typename Body> int with_format(Storage storage, Body body) {
  switch (storage) {
    case Storage::f32: return body(float());
    case Storage::f16: return body(__half());
    case Storage::bf16: return body(__nv_bfloat16());
    case Storage::f64: return body(double());
  }
  return cudaErrorInvalidValue;
}

template <typename S> __device__ __forceinline__ bool is_aligned(const S* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(uint4) == 0;
}

// How a run of elements at `base` splits: `head` of them before the first 16-byte boundary, `vectors` whole vectors,
// and a rest. A vector never touches a byte of the neighbouring runs, which others may be writing.
template <typename S> struct Span {
  int64_t vectors;
  int head;

  // `apart`: tensors that are walked together do not reach a boundary at the same element, so all go one by one.
  __device__ __forceinline__ Span(const S* base, int64_t length, bool apart) {
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(base) % sizeof(uint4) / sizeof(S));
    head = past == 0 ? 0 : Format<S>::kWidth - past;
    vectors = apart || length < head ? 0 : (length - head) / Format<S>::kWidth;
  }
  // Elements outside of the vectors, and where the i-th of them lies.
  __device__ __forceinline__ int64_t edges(int64_t length) const { return length - vectors * Format<S>::kWidth; }
  __device__ __forceinline__ int64_t edge(int64_t i) const { return i < head ? i : i + vectors * Format<S>::kWidth; }
};

// Zeros, by `size` threads.
template <typename S> __device__ __forceinline__ void clear(S* to, int64_t length, int thread, int size) {
  const Span<S> span(to, length, false);
  uint4* vectors = reinterpret_cast<uint4*>(to + span.head);
  for (int64_t i = thread; i < span.vectors; i += size) vectors[i] = make_uint4(0, 0, 0, 0);
  for (int64_t i = thread; i < span.edges(length); i += size) to[span.edge(i)] = Format<S>::stored(0);
}

}  // namespace cuda
}  // namespace sett
