#pragma once

// Vectors of WIDTH floats for the instruction set this file is compiled for, as GCC and Clang
// vector extensions, with loads and stores of float, bfloat16 and float16. Everything here has
// internal linkage: the linker must never merge copies built for different instruction sets.

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "bitkern/types.h"

namespace bitkern::cpu::BITKERN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t VecInt __attribute__((vector_size(4 * WIDTH)));  // also the type of a comparison
typedef uint32_t VecBits __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * WIDTH)));

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// body(T{}) with the element type of `dtype`.
template <class Body>
void with_dtype(DType dtype, Body&& body) {
  if (dtype == DType::float32) return body(float{});
  if (dtype == DType::bfloat16) return body(bfloat16{});
  body(float16{});
}

inline Vec broadcast(float value) { return value - Vec{}; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

// max(z, 0), but NaN for NaN.
inline Vec relu(Vec z) {
#if defined(__AVX512F__)
  return _mm512_max_ps(Vec{}, z);  // of which the second operand is the result for NaN
#else
  return z < 0.0f ? Vec{} : z;
#endif
}

// Conversions to and from float. Encoding rounds to nearest even and expects that a NaN comes from
// arithmetic, hence is quiet.

inline VecBits widen(VecHalf v) {
#if defined(__AVX512F__)  // GCC 12 would do it in two halves
  return (VecBits)_mm512_cvtepu16_epi32((__m256i)v);
#else
  return __builtin_convertvector(v, VecBits);
#endif
}

inline Vec decode(Vec v, float) { return v; }
inline Vec encode(Vec v, float) { return v; }

inline Vec decode(VecHalf v, bfloat16) { return (Vec)(widen(v) << 16); }

inline VecHalf encode(Vec v, bfloat16) {
#if defined(__AVX512BF16__)  // writes subnormals as zero
  return (VecHalf)_mm512_cvtneps_pbh(v);
#elif defined(__AVX512F__)
  __m512i bits = (__m512i)v;
  const __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
  const __mmask16 odd = _mm512_mask_test_epi32_mask(number, bits, _mm512_set1_epi32(1 << 16));
  bits = _mm512_mask_add_epi32(bits, number, bits, _mm512_set1_epi32(0x7fff));
  bits = _mm512_mask_add_epi32(bits, odd, bits, _mm512_set1_epi32(1));
  return (VecHalf)_mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
#else
  const VecBits bits = (VecBits)v;
  const VecBits rounded = bits + (0x7fff + ((bits >> 16) & 1));
  return __builtin_convertvector((v == v ? rounded : bits) >> 16, VecHalf);
#endif
}

#if defined(__AVX512F__)
inline Vec decode(VecHalf v, float16) { return _mm512_cvtph_ps((__m256i)v); }
inline VecHalf encode(Vec v, float16) { return (VecHalf)_mm512_cvtps_ph(v, 0); }
#elif defined(__AVX2__)
inline Vec decode(VecHalf v, float16) { return _mm256_cvtph_ps((__m128i)v); }
inline VecHalf encode(Vec v, float16) { return (VecHalf)_mm256_cvtps_ph(v, 0); }
#else
constexpr float HALF_MIN = 0x1p-14f;  // the smallest normal float16

inline Vec decode(VecHalf v, float16) {
  const VecBits half = widen(v);
  const VecBits magnitude = (half & 0x7fff) << 13;
  const VecBits normal = magnitude + (112u << 23);  // 127 - 15: the difference of the biases
  const VecBits special = magnitude + (224u << 23);
  // With the exponent of HALF_MIN in front, a subnormal is HALF_MIN too large.
  const VecBits subnormal = (VecBits)((Vec)(magnitude + (113u << 23)) - HALF_MIN);
  const VecBits finite = magnitude < (1u << 23) ? subnormal : normal;
  return (Vec)((magnitude < (0x7c00u << 13) ? finite : special) | (half & 0x8000) << 16);
}

inline VecHalf encode(Vec v, float16) {
  const VecBits magnitude = (VecBits)v & 0x7fffffff;
  const VecBits normal = (magnitude + (0xfff + ((magnitude >> 13) & 1)) - (112u << 23)) >> 13;
  // The last bit of 0.5f is the last bit of a subnormal, so that the addition rounds.
  const VecBits subnormal = (VecBits)((Vec)magnitude + 0.5f) - (126u << 23);
  const Vec size = (Vec)magnitude;
  VecBits bits = size < HALF_MIN ? subnormal : normal;
  bits = size < 65520.0f ? bits : 0x7c00 + VecBits{};
  bits = size == size ? bits : 0x7e00 + VecBits{};
  return __builtin_convertvector(bits | ((VecBits)v >> 16 & 0x8000), VecHalf);
}
#endif

template <class T>
using Encoded = decltype(encode(Vec{}, T{}));

template <class T>
inline Vec load(const T* p) {
  Encoded<T> v;
  memcpy(&v, p, sizeof v);
  return decode(v, T{});
}

template <class T>
inline void store(T* p, Vec value) {
  const Encoded<T> v = encode(value, T{});
  memcpy(p, &v, sizeof v);
}

template <class T>
inline Vec round_to(Vec value) {
  return decode(encode(value, T{}), T{});
}

// The first `count` < WIDTH lanes; the others read as 0.
template <class T>
inline Vec load(const T* p, int count) {
  T lanes[WIDTH] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <class T>
inline void store(T* p, Vec value, int count) {
  T lanes[WIDTH];
  store(lanes, value);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
}

#if defined(__AVX512F__)
inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }
inline Vec load(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
inline void store(float* p, Vec v, int count) { _mm512_mask_storeu_ps(p, first(count), v); }
template <class T>
inline Vec load16(const T* p, int count) {
  return decode((VecHalf)_mm256_maskz_loadu_epi16(first(count), p), T{});
}
template <class T>
inline void store16(T* p, Vec v, int count) {
  _mm256_mask_storeu_epi16(p, first(count), (__m256i)encode(v, T{}));
}
inline Vec load(const bfloat16* p, int count) { return load16(p, count); }
inline Vec load(const float16* p, int count) { return load16(p, count); }
inline void store(bfloat16* p, Vec v, int count) { store16(p, v, count); }
inline void store(float16* p, Vec v, int count) { store16(p, v, count); }
#endif

// The lanes of a vector that are in use: all of them, or the first `count`.
struct AllLanes {};
inline int size(AllLanes) { return WIDTH; }
inline int size(int count) { return count; }

// v with zeros in the lanes that are not in use.
inline Vec keep(Vec v, AllLanes) { return v; }
inline Vec keep(Vec v, int count) {
  float lanes[WIDTH];
  store(lanes, v);
  return load(lanes, count);
}

template <class T>
inline Vec load(const T* p, AllLanes) {
  return load(p);
}
template <class T>
inline void store(T* p, Vec v, AllLanes) {
  store(p, v);
}

// How many elements ahead to prefetch: the hardware stops at the end of a page, and does not always
// follow several streams.
template <class T>
constexpr int64_t AHEAD = 4096 / sizeof(T);

// Writes past the cache, without reading the lines first. `p` must be aligned to the vector, and
// stream_fence() come last.
template <class T>
inline void stream(T* p, Vec value) {
#if defined(__AVX2__)
  const Encoded<T> v = encode(value, T{});
  if constexpr (sizeof v == 64) _mm512_stream_si512((__m512i*)p, (__m512i)v);
  else if constexpr (sizeof v == 32) _mm256_stream_si256((__m256i*)p, (__m256i)v);
  else _mm_stream_si128((__m128i*)p, (__m128i)v);
#else
  store(p, value);
#endif
}

// Decides whether to stream an output of `bytes`, `p` one of its runs of `length` elements: an
// output that fits into a usual last-level cache beside the input stays there for its consumer.
template <class T>
inline bool past_cache(int64_t bytes, const T* p, int64_t length) {
  constexpr int64_t CACHE = 16 << 20;
  return bytes > CACHE && length % WIDTH == 0 && reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class T>
inline void store(T* p, Vec v, AllLanes, bool past_cache) {
  if (past_cache) stream(p, v);
  else store(p, v);
}
template <class T>
inline void store(T* p, Vec v, int count, bool) {
  store(p, v, count);
}

// body(offset, lanes) over `length` elements, vector by vector.
template <class Body>
inline void for_vectors(int64_t length, Body&& body) {
  int64_t i = 0;
  for (; i + WIDTH <= length; i += WIDTH) body(i, AllLanes{});
  if (i < length) body(i, static_cast<int>(length - i));
}

template <int N>
struct Rows {
  static constexpr int count = N;
};

// body(row, Rows<ROWS>) over as many full sets of rows as there are, then row by row.
template <int ROWS, class Body>
inline void for_rows(int64_t begin, int64_t end, Body&& body) {
  int64_t row = begin;
  for (; row + ROWS <= end; row += ROWS) body(row, Rows<ROWS>{});
  for (; row < end; ++row) body(row, Rows<1>{});
}

inline float sum(Vec v) {
#if defined(__AVX512F__)
  const __m256 half = _mm512_castps512_ps256(v) + _mm512_extractf32x8_ps(v, 1);
#elif defined(__AVX2__)
  const __m256 half = v;
#endif
#if defined(__AVX2__)
  const __m128 quarter = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
#else
  const Vec quarter = v;
#endif
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// e^x for finite results (above 88 it stays at e^88), NaN for NaN; 1.5 units in the last place.
inline Vec exp(Vec x) {
  x = x > 88.0f ? broadcast(88.0f) : x;
  x = x < -87.0f ? broadcast(-87.0f) : x;
  constexpr float ROUNDER = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const Vec shifted = fma(x, broadcast(0x1.715476p0f), broadcast(ROUNDER));
  const Vec n = shifted - ROUNDER;
  // ln 2 in two parts, the first with trailing zeros so that n times it is exact.
  const Vec r = fma(n, broadcast(0x1.bd0106p-13f), fma(n, broadcast(-0x1.63p-1f), x));
  // 1 + r + r² q(r); q is the Chebyshev fit of degree 4 on |r| <= ln 2 / 2.
  Vec q = fma(r, broadcast(0x1.6d4328p-10f), broadcast(0x1.120b74p-7f));
  q = fma(r, q, broadcast(0x1.5554eap-5f));
  q = fma(r, q, broadcast(0x1.5554dcp-3f));
  q = fma(r, q, broadcast(0.5f));
  const Vec e = fma(r * r, q, r) + 1.0f;
  return (Vec)((VecBits)e + ((VecBits)shifted << 23));
}

// e^x for x below 88, with the subnormal results and the 0 that exp() has not.
inline Vec exp_down(Vec x) {
  const VecInt low = x < -64.0f;
  const Vec e = exp(low ? x + 64.0f : x);
  return low ? e * 0x1.969d48p-93f : e;  // e^-64
}

}  // namespace
}  // namespace bitkern::cpu::BITKERN_ISA
