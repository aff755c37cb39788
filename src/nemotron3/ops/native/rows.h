// Products of a few rows with a matrix [out, in] that is read from memory: y = x W^T.
//
// The time goes into reading W, so W is read once and in order, one output after another along its
// inputs, for as many rows as the registers hold; further rows find it in the L1 cache. With few
// rows the processor prefetches such a stream by itself; with more it looks less far ahead, so the
// code prefetches. An output is summed in the same order for any number of rows.
#pragma once
#include "simd.h"
#include "weights.h"

constexpr int64_t FEW_ROWS = 8;  // up to which transposing W for gemm.h costs more than it gains

namespace detail {
constexpr int64_t MOST = 4;     // rows at a time
constexpr int64_t AHEAD = 2048;  // bytes: about what memory delivers while a row is summed

// `vectors[i]` summed over its lanes, for LANES vectors at once.
INLINE vec sums(vec (&vectors)[LANES]) {
  transpose(vectors);
#pragma GCC unroll 4
  for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) vectors[i] += vectors[i + half];
  return vectors[0];
}

template <int M, class At>
INLINE void multiply(const float* x, int64_t ldx, At w, int64_t n, vec (&to)[M]) {
  const vec weights = n == LANES ? load(w) : load_part(w, n);
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
    to[m] += weights * (n == LANES ? load(x + m * ldx) : load_part(x + m * ldx, n));
}

// One output for M rows, not yet summed over lanes; `w` is where its elements are.
template <int M, bool ASK, class At>
INLINE void dots(const float* x, int64_t ldx, At w, int64_t depth, vec* total) {
  vec even[M]{}, odd[M]{};  // two chains: a sum waits for the one before
  int64_t t = 0;
  for (; t + 2 * LANES <= depth; t += 2 * LANES) {
    if (ASK) prefetch(w + t, AHEAD);
    multiply<M>(x + t, ldx, w + t, LANES, even);
    if (ASK) prefetch(w + t + LANES, AHEAD);
    multiply<M>(x + t + LANES, ldx, w + t + LANES, LANES, odd);
  }
  if (t + LANES <= depth) {
    multiply<M>(x + t, ldx, w + t, LANES, even);
    t += LANES;
  }
  if (t < depth) multiply<M>(x + t, ldx, w + t, depth - t, odd);
#pragma GCC unroll 4
  for (int m = 0; m < M; m++) total[m] = even[m] + odd[m];
}

// `outputs` for M rows, so few that their sums fit in one vector.
template <int M, bool ASK, class W>
static void few_rows(const float* x, int64_t ldx, W w, int64_t outputs, int64_t depth, float* y,
                     int64_t ldy) {
  vec total[LANES]{};
  for (int64_t r = 0; r < outputs; r++)
    dots<M, ASK>(x, ldx, elements(w) + r * depth, depth, total + r * M);
  const vec result = sums(total);
  for (int m = 0; m < M; m++)
    for (int64_t r = 0; r < outputs; r++) y[m * ldy + r] = scaled(w, r, result[r * M + m]);
}

template <bool ASK, class W>
static void few_rows(int64_t rows, const float* x, int64_t ldx, W w, int64_t outputs, int64_t depth,
                     float* y, int64_t ldy) {
  switch (rows) {
    case 1: return few_rows<1, ASK>(x, ldx, w, outputs, depth, y, ldy);
    case 2: return few_rows<2, ASK>(x, ldx, w, outputs, depth, y, ldy);
    case 3: return few_rows<3, ASK>(x, ldx, w, outputs, depth, y, ldy);
    default: return few_rows<4, ASK>(x, ldx, w, outputs, depth, y, ldy);
  }
}
}  // namespace detail

// y [rows, first..last) for any number of rows; the columns of y are the outputs of W.
template <class W>
static inline void few_rows(int64_t rows, const float* x, int64_t ldx, W w, int64_t first,
                            int64_t last, int64_t depth, float* y, int64_t ldy) {
  if (rows == 0) return;
  const int64_t groups = (rows + detail::MOST - 1) / detail::MOST;
  const int64_t most = (rows + groups - 1) / groups;  // rows of a group
  const int64_t step = LANES / most;
  for (int64_t n = first; n < last; n += step) {
    const int64_t outputs = last - n < step ? last - n : step;
    detail::few_rows<true>(most, x, ldx, from_row(w, n, depth), outputs, depth, y + n, ldy);
    for (int64_t m = most; m < rows; m += most)
      detail::few_rows<false>(rows - m < most ? rows - m : most, x + m * ldx, ldx,
                              from_row(w, n, depth), outputs, depth, y + m * ldy + n, ldy);
  }
}
