// The formats of a weight matrix [out, in]: plain floats, bfloat16, or codes with scales.
//
// Weights may be in a mapped file, so nothing here needs more than the alignment of an element.
// Kernels that multiply with a weight are templates over these types and use the functions below.
// packed.h has the formats of four and eight floating-point bits.
#pragma once
#include "bfloat16.h"

// W[n][k] = scales[n] * codes[n][k].
struct Int8Rows {
  const int8_t* codes;
  const float* scales;
};

INLINE vec load(const int8_t* p) {
#if defined(__AVX512F__)
  // The masked form with a full mask: GCC 12 warns of undefined values in the plain form.
  const __m512i wide = _mm512_maskz_cvtepi8_epi32(-1, _mm_loadu_si128((const __m128i*)p));
  return (vec)_mm512_maskz_cvtepi32_ps(-1, wide);
#elif defined(__AVX2__)
  return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  vec v;
  for (int i = 0; i < LANES; i++) v[i] = p[i];
  return v;
#endif
}
INLINE vec load_part(const int8_t* p, int64_t n) {
  int8_t whole[LANES]{};
  memcpy(whole, p, n);
  return load(whole);
}

// The matrix from row n on, with rows `ld` elements apart, and from column t on.
INLINE const float* from_row(const float* w, int64_t n, int64_t ld) { return w + n * ld; }
INLINE Int8Rows from_row(Int8Rows w, int64_t n, int64_t ld) {
  return {w.codes + n * ld, w.scales + n};
}
INLINE const bfloat16* from_row(const bfloat16* w, int64_t n, int64_t ld) { return w + n * ld; }
INLINE const float* from_column(const float* w, int64_t t) { return w + t; }
INLINE const bfloat16* from_column(const bfloat16* w, int64_t t) { return w + t; }
INLINE Int8Rows from_column(Int8Rows w, int64_t t) { return {w.codes + t, w.scales}; }

// Where the elements are in memory, and the scale of row n.
INLINE const float* elements(const float* w) { return w; }
INLINE const bfloat16* elements(const bfloat16* w) { return w; }
INLINE const int8_t* elements(Int8Rows w) { return w.codes; }
INLINE float scaled(const float*, int64_t, float x) { return x; }
template <class X>
INLINE X scaled(const bfloat16*, int64_t, X x) { return x; }
template <class X>
INLINE X scaled(Int8Rows w, int64_t n, X x) { return w.scales[n] * x; }

// Ask for the elements that are `bytes` further on.
template <class T>
INLINE void prefetch(const T* p, int64_t bytes) { __builtin_prefetch((const char*)p + bytes); }
