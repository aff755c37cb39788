// Products of a few rows with a matrix [out, in] that is read from memory: y = x W^T.
//
// These are bound by the reading of W. Vectors run along the inputs, every element of W is read once
// and in order for all rows, and what comes next is asked for ahead of time. An output is summed in
// the same order for any number of rows.
#pragma once
#include "simd.h"

constexpr int64_t FEW_ROWS = 8;  // up to which turning W for gemm.h costs more than it gains

namespace detail {
// `vectors[i]` summed over its lanes, for LANES vectors at once.
INLINE vec sums(vec (&vectors)[LANES]) {
  transpose(vectors);
#pragma GCC unroll 4
  for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) vectors[i] += vectors[i + half];
  return vectors[0];
}

// R outputs of M rows. R * M is at most LANES, so that their sums fit one vector. `ahead` is what will
// be read next, brought as near as the second cache: the first has no room for it.
template <int M, int R>
INLINE void dots(const float* x, int64_t ldx, const float* w, const float* ahead, int64_t depth,
                 float* y, int64_t ldy) {
  vec total[LANES]{};
  int64_t t = 0;
  for (; t + LANES <= depth; t += LANES) {
    vec rows[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) rows[m] = load(x + m * ldx + t);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const vec weights = load(w + r * depth + t);
      __builtin_prefetch(ahead + r * depth + t, 0, 2);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) total[r * M + m] += weights * rows[m];
    }
  }
  if (t < depth)
    for (int r = 0; r < R; r++) {
      const vec weights = load_part(w + r * depth + t, depth - t);
      for (int m = 0; m < M; m++) total[r * M + m] += weights * load_part(x + m * ldx + t, depth - t);
    }
  const vec result = sums(total);
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) y[m * ldy + r] = result[r * M + m];
}

template <int M>
static void few_rows(const float* x, int64_t ldx, const float* w, int64_t first, int64_t last,
                     int64_t depth, float* y, int64_t ldy, const float* next) {
  constexpr int R = LANES / M > 0 ? LANES / M : 1;
  int64_t n = first;
  if (!next) next = w + first * depth;  // in the cache already
  for (; n + R <= last; n += R) {
    const float* at = w + n * depth;
    dots<M, R>(x, ldx, at, n + 2 * R <= last ? at + R * depth : next, depth, y + n, ldy);
  }
  for (; n < last; n++) dots<M, 1>(x, ldx, w + n * depth, next, depth, y + n, ldy);
}

}  // namespace detail

// y [rows, first..last) for any number of rows; columns of y are outputs of W. `next` is what will be
// read after that, where it is known.
static inline void few_rows(int64_t rows, const float* x, int64_t ldx, const float* w,
                            int64_t first, int64_t last, int64_t depth, float* y, int64_t ldy,
                            const float* next = nullptr) {
  constexpr int64_t MOST = LANES < FEW_ROWS ? LANES : FEW_ROWS;
  for (; rows > MOST; rows -= MOST, x += MOST * ldx, y += MOST * ldy)
    detail::few_rows<MOST>(x, ldx, w, first, last, depth, y, ldy, w + first * depth);
  switch (rows) {
    case 1: return detail::few_rows<1>(x, ldx, w, first, last, depth, y, ldy, next);
    case 2: return detail::few_rows<2>(x, ldx, w, first, last, depth, y, ldy, next);
    case 3: return detail::few_rows<3>(x, ldx, w, first, last, depth, y, ldy, next);
    case 4: return detail::few_rows<4>(x, ldx, w, first, last, depth, y, ldy, next);
#if defined(__AVX__)
    case 5: return detail::few_rows<5>(x, ldx, w, first, last, depth, y, ldy, next);
    case 6: return detail::few_rows<6>(x, ldx, w, first, last, depth, y, ldy, next);
    case 7: return detail::few_rows<7>(x, ldx, w, first, last, depth, y, ldy, next);
    case 8: return detail::few_rows<8>(x, ldx, w, first, last, depth, y, ldy, next);
#endif
  }
}
