// Products of a few rows with a matrix [out, in] that is read from memory: y = x W^T.
//
// The time goes into reading W, so W is read once and in order, one output after another along its
// inputs, for as many rows as the registers hold; further rows find it in the L1 cache. With few
// rows the processor prefetches such a stream by itself; with more it looks less far ahead, so the
// code prefetches. An output is summed in the same order for any number of rows.
#pragma once
#include <type_traits>

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

// Elements that one step of a sum multiplies: those of a vector, or of a vector of pairs.
template <class X, class At>
constexpr bool IN_PAIRS = std::is_same_v<X, bfloat16> && std::is_pointer_v<At>;
template <class X, class At>
constexpr int64_t STEP = IN_PAIRS<X, At> ? PAIRED : LANES;

template <int M, class X, class At>
INLINE void multiply(const X* x, int64_t ldx, At w, int64_t n, vec (&to)[M]) {
  constexpr int64_t WHOLE = STEP<X, At>;
  if constexpr (IN_PAIRS<X, At>) {
    const ivec weights = n == WHOLE ? load_pairs(w) : load_pairs_part(w, n);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      const X* row = x + m * ldx;
      to[m] = dot(to[m], weights, n == WHOLE ? load_pairs(row) : load_pairs_part(row, n));
    }
  } else {
    const vec weights = n == WHOLE ? load(w) : load_part(w, n);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
      to[m] += weights * (n == WHOLE ? load(x + m * ldx) : load_part(x + m * ldx, n));
  }
}

// One output for M rows, not yet summed over lanes; `w` is where its elements are.
template <int M, bool ASK, class X, class At>
INLINE void dots(const X* x, int64_t ldx, At w, int64_t depth, vec* total) {
  constexpr int64_t WHOLE = STEP<X, At>;
  vec even[M]{}, odd[M]{};  // two chains: a sum waits for the one before
  int64_t t = 0;
  for (; t + 2 * WHOLE <= depth; t += 2 * WHOLE) {
    if (ASK) prefetch(w + t, AHEAD);
    multiply<M>(x + t, ldx, w + t, WHOLE, even);
    if (ASK) prefetch(w + t + WHOLE, AHEAD);
    multiply<M>(x + t + WHOLE, ldx, w + t + WHOLE, WHOLE, odd);
  }
  if (t + WHOLE <= depth) {
    multiply<M>(x + t, ldx, w + t, WHOLE, even);
    t += WHOLE;
  }
  if (t < depth) multiply<M>(x + t, ldx, w + t, depth - t, odd);
#pragma GCC unroll 4
  for (int m = 0; m < M; m++) total[m] = even[m] + odd[m];
}

// `outputs` for M rows, so few that their sums fit in one vector.
template <int M, bool ASK, class X, class W, class Y>
static void few_rows(const X* x, int64_t ldx, W w, int64_t outputs, int64_t depth, Y* y,
                     int64_t ldy) {
  vec total[LANES]{};
  for (int64_t r = 0; r < outputs; r++)
    dots<M, ASK>(x, ldx, elements(w) + r * depth, depth, total + r * M);
  const vec result = sums(total);
  for (int m = 0; m < M; m++)
    for (int64_t r = 0; r < outputs; r++) put(y + m * ldy + r, scaled(w, r, result[r * M + m]));
}

template <bool ASK, class X, class W, class Y>
static void few_rows(int64_t rows, const X* x, int64_t ldx, W w, int64_t outputs, int64_t depth,
                     Y* y, int64_t ldy) {
  switch (rows) {
    case 1: return few_rows<1, ASK>(x, ldx, w, outputs, depth, y, ldy);
    case 2: return few_rows<2, ASK>(x, ldx, w, outputs, depth, y, ldy);
    case 3: return few_rows<3, ASK>(x, ldx, w, outputs, depth, y, ldy);
    default: return few_rows<4, ASK>(x, ldx, w, outputs, depth, y, ldy);
  }
}
}  // namespace detail

// y [rows, first..last) for any number of rows; the columns of y are the outputs of W.
template <class X, class W, class Y>
static inline void few_rows(int64_t rows, const X* x, int64_t ldx, W w, int64_t first, int64_t last,
                            int64_t depth, Y* y, int64_t ldy) {
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
