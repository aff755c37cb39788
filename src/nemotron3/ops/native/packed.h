// Weight matrices [out, in] in NVFP4 and FP8, which are decoded as they are multiplied.
//
//   NVFP4: W[n][k] = tensor_scales[n] * e4m3(block_scales[n][k / 16]) * e2m1(codes[n][k])
//   FP8:   W[n][k] = scales[n] * e4m3(codes[n][k])
//
// Element times block scale is exact in float32, and the scale of a matrix multiplies the sum. A
// code is an index into a table in a register, where there are registers of eight numbers or more;
// eight bits become a half-precision number by a shift, since the exponents differ by eight only.
// Codes and block scales are no NaN: loading a model refuses them.
#pragma once
#include "weights.h"

struct NVFP4Rows {
  const uint8_t* codes;   // two in a byte, the even one in the low half
  const uint8_t* blocks;  // E4M3, one for 16 elements
  const float* tensor_scales;
};

struct FP8Rows {
  const uint8_t* codes;
  const float* scales;
};

// Where an element of a matrix is.
struct NVFP4At {
  const uint8_t *codes, *blocks;
  int64_t at;
};
INLINE NVFP4At operator+(NVFP4At p, int64_t n) { return {p.codes, p.blocks, p.at + n}; }
struct FP8At {
  const uint8_t* codes;
};
INLINE FP8At operator+(FP8At p, int64_t n) { return {p.codes + n}; }

namespace detail {
constexpr int64_t BLOCK = 16;

// 2^power, for the constants below.
constexpr float power_of_two(int power) {
  float value = 1.0f;
  for (; power > 0; power--) value *= 2.0f;
  for (; power < 0; power++) value *= 0.5f;
  return value;
}

struct E4M3Table {
  float values[256];
  constexpr E4M3Table() : values() {
    for (int code = 0; code < 256; code++) {
      const int exponent = code >> 3 & 15, mantissa = code & 7;
      const float magnitude = exponent ? (8 + mantissa) * power_of_two(exponent - 10)
                                       : mantissa * power_of_two(-9);
      values[code] = code & 128 ? -magnitude : magnitude;
    }
  }
};
constexpr E4M3Table E4M3{};
alignas(64) constexpr float E2M1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                        -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

constexpr float FP8_FACTOR = 256.0f;  // what `load` leaves out of every number
}  // namespace detail

INLINE vec load(NVFP4At p) {
  const float scale = detail::E4M3.values[p.blocks[p.at / detail::BLOCK]];
  const uint8_t* codes = p.codes + p.at / 2;
#if defined(__AVX512F__)
  // An index of the table is the low four bits of a lane, so the others need no clearing.
  const __m128i pairs = _mm_loadl_epi64((const __m128i*)codes);
  const __m128i each = _mm_unpacklo_epi8(pairs, _mm_srli_epi16(pairs, 4));
  const __m512i indices = _mm512_maskz_cvtepu8_epi32(-1, each);
  return (vec)_mm512_maskz_permutexvar_ps(-1, indices, _mm512_load_ps(detail::E2M1)) * scale;
#elif defined(__AVX2__)
  // The table has the magnitudes, and the fourth bit becomes the sign.
  int32_t four;
  memcpy(&four, codes, 4);
  const __m128i pairs = _mm_cvtsi32_si128(four);
  const __m128i each = _mm_unpacklo_epi8(pairs, _mm_srli_epi16(pairs, 4));
  const __m256i indices = _mm256_cvtepu8_epi32(each);
  const __m256 magnitudes = _mm256_permutevar8x32_ps(_mm256_load_ps(detail::E2M1), indices);
  const __m256i signs = _mm256_slli_epi32(_mm256_and_si256(indices, _mm256_set1_epi32(8)), 28);
  return (vec)_mm256_xor_ps(magnitudes, _mm256_castsi256_ps(signs)) * scale;
#else
  vec v;
  for (int i = 0; i < LANES; i++) v[i] = detail::E2M1[codes[i / 2] >> 4 * (i % 2) & 15] * scale;
  return v;
#endif
}
INLINE vec load(FP8At p) {
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
#if defined(__AVX512F__)
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p.codes));
  const __m256i signs = _mm256_and_si256(_mm256_slli_epi16(wide, 8), _mm256_set1_epi16(-32768));
  const __m256i rest = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(0x3f80));
  return (vec)_mm512_maskz_cvtph_ps(-1, _mm256_or_si256(signs, rest));
#else
  const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p.codes));
  const __m128i signs = _mm_and_si128(_mm_slli_epi16(wide, 8), _mm_set1_epi16(-32768));
  const __m128i rest = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(0x3f80));
  return (vec)_mm256_cvtph_ps(_mm_or_si128(signs, rest));
#endif
#else
  vec v;
  for (int i = 0; i < LANES; i++) v[i] = detail::E4M3.values[p.codes[i]] / detail::FP8_FACTOR;
  return v;
#endif
}

// The first n of LANES elements; the others are zero. Rows of NVFP4 are whole blocks.
INLINE vec load_part(NVFP4At p, int64_t) { return load(p); }
INLINE vec load_part(FP8At p, int64_t n) {
  uint8_t whole[LANES]{};
  memcpy(whole, p.codes, n);
  return load(FP8At{whole});
}

INLINE NVFP4Rows from_row(NVFP4Rows w, int64_t n, int64_t ld) {
  return {w.codes + n * ld / 2, w.blocks + n * ld / detail::BLOCK, w.tensor_scales + n};
}
INLINE NVFP4Rows from_column(NVFP4Rows w, int64_t t) {
  return {w.codes + t / 2, w.blocks + t / detail::BLOCK, w.tensor_scales};
}
INLINE FP8Rows from_row(FP8Rows w, int64_t n, int64_t ld) {
  return {w.codes + n * ld, w.scales + n};
}
INLINE FP8Rows from_column(FP8Rows w, int64_t t) { return {w.codes + t, w.scales}; }

INLINE NVFP4At elements(NVFP4Rows w) { return {w.codes, w.blocks, 0}; }
INLINE FP8At elements(FP8Rows w) { return {w.codes}; }
template <class X>
INLINE X scaled(NVFP4Rows w, int64_t n, X x) { return w.tensor_scales[n] * x; }
template <class X>
INLINE X scaled(FP8Rows w, int64_t n, X x) { return w.scales[n] * (detail::FP8_FACTOR * x); }

INLINE void prefetch(NVFP4At p, int64_t bytes) { prefetch(p.codes + p.at / 2, bytes); }
INLINE void prefetch(FP8At p, int64_t bytes) { prefetch(p.codes, bytes); }
