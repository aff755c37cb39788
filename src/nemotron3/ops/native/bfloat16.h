// The element type bfloat16, the upper half of a float32, and sums of its products.
//
// Memory holds bfloat16, registers hold float32: numbers are widened when they are loaded, which is
// exact, and rounded to nearest even when they are stored. Products take two numbers at a time,
// neighbours along the depth of a product, in one lane of 32 bits: AVX512_BF16 multiplies and adds
// such pairs, twice as many numbers a cycle as in float32. Where a processor lacks it, `dot`
// computes the same sums in float32, without the speed.
#pragma once
#include "simd.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

typedef uint16_t bfloat16;

#if defined(__AVX512BF16__)
constexpr bool MULTIPLIES_BFLOAT16 = true;
#else
constexpr bool MULTIPLIES_BFLOAT16 = false;
#endif

namespace detail {
typedef bfloat16 halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));

INLINE halves rounded(vec v) {
#if defined(__AVX512BF16__)
  return (halves)_mm512_cvtneps_pbh((__m512)v);
#else
  const uvec bits = (uvec)v, even = bits + 0x7fff + (bits >> 16 & 1);
  const uvec quiet = bits | 0x400000;  // rounding could turn a NaN into infinity
  return __builtin_convertvector((v == v ? even : quiet) >> 16, halves);
#endif
}
INLINE uvec widened(halves v) { return __builtin_convertvector(v, uvec); }
}  // namespace detail

INLINE vec load(const bfloat16* p) {
  detail::halves upper;
  memcpy(&upper, p, sizeof upper);
  return (vec)(detail::widened(upper) << 16);
}
INLINE vec load_part(const bfloat16* p, int64_t n) {
  bfloat16 whole[LANES]{};
  memcpy(whole, p, 2 * n);
  return load(whole);
}
INLINE void store(bfloat16* p, vec v) {
  const detail::halves upper = detail::rounded(v);
  memcpy(p, &upper, sizeof upper);
}
INLINE void store_part(bfloat16* p, vec v, int64_t n) {
  const detail::halves upper = detail::rounded(v);
  memcpy(p, &upper, 2 * n);
}

// One element of either type.
INLINE float number(float x) { return x; }
INLINE float number(bfloat16 x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
INLINE void put(float* p, float x) { *p = x; }
INLINE void put(bfloat16* p, float x) {
  const detail::halves upper = detail::rounded(splat(x));
  memcpy(p, &upper, 2);
}

// n elements, rounded or widened where the types differ.
template <class From, class To>
INLINE void copy_numbers(const From* from, int64_t n, To* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
  if (i < n) store_part(to + i, load_part(from + i, n - i), n - i);
}

constexpr int64_t PAIRED = 2 * LANES;  // elements of a vector of pairs

// Consecutive elements, two in each lane. Float32 is rounded on the way.
INLINE ivec load_pairs(const bfloat16* p) {
  ivec v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE ivec load_pairs(const float* p) {
  bfloat16 narrow[PAIRED];
  store(narrow, load(p));
  store(narrow + LANES, load(p + LANES));
  return load_pairs(narrow);
}
// The first n of them; the others are zero.
template <class T>
INLINE ivec load_pairs_part(const T* p, int64_t n) {
  T whole[PAIRED]{};
  memcpy(whole, p, sizeof(T) * n);
  return load_pairs(whole);
}

// Elements of two rows, one of each in a lane; a null row is zero. Only the first n exist.
INLINE detail::halves halves_of(const bfloat16* p, int64_t n) {
  detail::halves v{};
  if (n >= LANES) memcpy(&v, p, sizeof v);
  else memcpy(&v, p, 2 * n);
  return v;
}
INLINE detail::halves halves_of(const float* p, int64_t n) {
  return detail::rounded(n >= LANES ? load(p) : load_part(p, n));
}
template <class T>
INLINE ivec interleaved(const T* even, const T* odd, int64_t n) {
  const detail::uvec lower = detail::widened(halves_of(even, n));
  return (ivec)(odd ? lower | detail::widened(halves_of(odd, n)) << 16 : lower);
}

// sum + a b, for both numbers of each lane.
INLINE vec dot(vec sum, ivec a, ivec b) {
#if defined(__AVX512BF16__)
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  const int32_t upper = (int32_t)0xffff0000;
  sum += (vec)(a & upper) * (vec)(b & upper);
  return sum + (vec)(a << 16) * (vec)(b << 16);
#endif
}
