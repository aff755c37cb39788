// Matrix products of bfloat16 on one thread, with sums in float32 (see gemm.h for the calls).
//
// A strip of B is packed as pairs along the depth: element (t, n) and (t + 1, n) are one word, so
// that a word of A, which has its pairs in place, meets a vector of words of B. A transposed A is
// turned back, a block at a time. So every tile gets rows of A and a packed strip of B, the layout
// that processors with tiles of bfloat16 (AMX) read as well: `pair_tile` is the only function that
// depends on the instructions. B may be float32, which is rounded on the way. C is float32, or
// bfloat16, which is rounded once: sums that are not complete stay in float32.
#pragma once
#include <type_traits>

#include "gemm.h"

namespace detail {
constexpr int64_t SLICE = 256;      // depth of a strip of B that stays in the L1 cache
constexpr int64_t MOST_ROWS = 240;  // of a block of A, or of incomplete sums, on the stack: tiles

// R rows and V vectors of C; `tail` is the number of elements in the last vector.
template <int R, int V, class C>
INLINE void pair_tile(int64_t depth, const bfloat16* a, int64_t lda, const int32_t* b,
                      const float* from, int64_t ldfrom, C* c, int64_t ldc, int64_t tail) {
  vec sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const float* at = from + r * ldfrom + v * LANES;
      if (!from) sums[r][v] = vec{};
      else sums[r][v] = v + 1 < V || tail == LANES ? load(at) : load_part(at, tail);
    }
  const auto multiply = [&](int64_t t, auto element) __attribute__((always_inline)) {
    ivec row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) memcpy(&row[v], b + t / 2 * WIDTH + v * LANES, sizeof row[v]);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      decltype(element) word;
      memcpy(&word, a + r * lda + t, sizeof word);
      const ivec x = (int32_t)word - ivec{};
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sums[r][v] = dot(sums[r][v], x, row[v]);
    }
  };
  int64_t t = 0;
  for (; t + 2 <= depth; t += 2) multiply(t, int32_t());
  if (t < depth) multiply(t, uint16_t());
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      C* at = c + r * ldc + v * LANES;
      if (v + 1 < V || tail == LANES) store(at, sums[r][v]);
      else store_part(at, sums[r][v], tail);
    }
}

template <int V, class C>
static void pair_strip(int64_t rows, int64_t depth, const bfloat16* a, int64_t lda,
                       const int32_t* b, const float* from, int64_t ldfrom, C* c, int64_t ldc,
                       int64_t tail) {
  int64_t r = 0;
  const auto earlier = [&] { return from ? from + r * ldfrom : nullptr; };
  for (; r + ROWS <= rows; r += ROWS)
    pair_tile<ROWS, V>(depth, a + r * lda, lda, b, earlier(), ldfrom, c + r * ldc, ldc, tail);
  a += r * lda;
  c += r * ldc;
  switch (rows - r) {
    case 5: pair_tile<5, V>(depth, a, lda, b, earlier(), ldfrom, c, ldc, tail); break;
    case 4: pair_tile<4, V>(depth, a, lda, b, earlier(), ldfrom, c, ldc, tail); break;
    case 3: pair_tile<3, V>(depth, a, lda, b, earlier(), ldfrom, c, ldc, tail); break;
    case 2: pair_tile<2, V>(depth, a, lda, b, earlier(), ldfrom, c, ldc, tail); break;
    case 1: pair_tile<1, V>(depth, a, lda, b, earlier(), ldfrom, c, ldc, tail); break;
  }
}

// C = `from` + A B for a packed strip of B, `width` columns of it.
template <class C>
static void pair_strip(int64_t rows, int64_t width, int64_t depth, const bfloat16* a, int64_t lda,
                       const int32_t* b, const float* from, int64_t ldfrom, C* c, int64_t ldc) {
  const int64_t vectors = (width + LANES - 1) / LANES, tail = width - (vectors - 1) * LANES;
  switch (vectors) {
    case 4: pair_strip<4>(rows, depth, a, lda, b, from, ldfrom, c, ldc, tail); break;
    case 3: pair_strip<3>(rows, depth, a, lda, b, from, ldfrom, c, ldc, tail); break;
    case 2: pair_strip<2>(rows, depth, a, lda, b, from, ldfrom, c, ldc, tail); break;
    case 1: pair_strip<1>(rows, depth, a, lda, b, from, ldfrom, c, ldc, tail); break;
  }
}

// Pairs of `rows` rows, `depth` elements of each, transposed: to[t / 2][row].
template <class T>
INLINE void turn_pairs(const T* from, int64_t ld, int64_t rows, int64_t depth, int32_t* to,
                       int64_t ld_to) {
  for (int64_t n = 0; n < rows; n += LANES)
    for (int64_t t = 0; t < depth; t += PAIRED) {
      const int64_t left = depth - t, words = left < PAIRED ? (left + 1) / 2 : LANES;
      vec square[LANES];
#pragma GCC unroll 16
      for (int r = 0; r < LANES; r++) {
        const T* row = from + (n + r) * ld + t;
        if (n + r >= rows) square[r] = vec{};
        else square[r] = (vec)(left < PAIRED ? load_pairs_part(row, left) : load_pairs(row));
      }
      transpose(square);
#pragma GCC unroll 16
      for (int r = 0; r < LANES; r++)
        if (r < words) memcpy(to + (t / 2 + r) * ld_to + n, &square[r], sizeof square[r]);
    }
}

// Pairs of consecutive rows, `width` elements of each.
template <class T>
INLINE void pack_pairs(const T* from, int64_t ld, int64_t depth, int64_t width, int32_t* to) {
  for (int64_t t = 0; t < depth; t += 2, from += 2 * ld, to += WIDTH)
    for (int64_t n = 0; n < width; n += LANES) {
      const T* odd = t + 1 < depth ? from + ld + n : nullptr;
      const ivec words = interleaved(from + n, odd, width - n);
      memcpy(to + n, &words, sizeof words);
    }
}

template <bool TURN, class B>
INLINE void pack_strip(const B* b, int64_t ldb, int64_t t, int64_t n, int64_t depth, int64_t width,
                       int32_t* to) {
  if (TURN) turn_pairs(b + n * ldb + t, ldb, width, depth, to, WIDTH);
  else pack_pairs(b + t * ldb + n, ldb, depth, width, to);
}

INLINE int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

// A has its pairs in place. Incomplete sums of a bfloat16 C are kept beside it.
template <bool TURN, class B, class C>
static void pair_blocks(int64_t rows, int64_t columns, int64_t depth, const bfloat16* a,
                        int64_t lda, const B* b, int64_t ldb, C* c, int64_t ldc, bool add) {
  constexpr bool WIDE = std::is_same_v<C, float>;
  alignas(64) int32_t strip[SLICE / 2 * WIDTH];
  alignas(64) float sums[WIDE ? 1 : MOST_ROWS * WIDTH];
  const int64_t block = WIDE || depth <= SLICE ? rows : MOST_ROWS;
  for (int64_t m = 0; m < rows; m += block)
    for (int64_t n = 0; n < columns; n += WIDTH) {
      const int64_t height = at_most(rows - m, block), width = at_most(columns - n, WIDTH);
      C* to = c + m * ldc + n;
      for (int64_t t = 0; t < depth || t == 0; t += SLICE) {
        const int64_t part = at_most(depth - t, SLICE);
        const bfloat16* from = a + m * lda + t;
        pack_strip<TURN>(b, ldb, t, n, part, width, strip);
        if constexpr (WIDE) {
          pair_strip(height, width, part, from, lda, strip, add || t ? to : nullptr, ldc, to, ldc);
        } else {
          const float* earlier = t ? sums : nullptr;
          if (t + SLICE < depth)
            pair_strip(height, width, part, from, lda, strip, earlier, WIDTH, sums, WIDTH);
          else pair_strip(height, width, part, from, lda, strip, earlier, WIDTH, to, ldc);
        }
      }
    }
}

// to[m][t] = from[t][m], for an A that is stored transposed.
INLINE void turn_block(const bfloat16* from, int64_t ld, int64_t rows, int64_t depth, bfloat16* to,
                       int64_t ld_to) {
  for (int64_t t = 0; t < depth; t += PAIRED)
    for (int64_t m = 0; m < rows; m += LANES) {
      vec square[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) {
        const bfloat16* even = from + (t + 2 * i) * ld + m;
        const bfloat16* odd = t + 2 * i + 1 < depth ? even + ld : nullptr;
        square[i] = t + 2 * i < depth ? (vec)interleaved(even, odd, rows - m) : vec{};
      }
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++)
        if (m + i < rows) memcpy(to + (m + i) * ld_to + t, &square[i], sizeof square[i]);
    }
}

// A is stored transposed: a block of it is turned for all strips of B.
template <bool TURN, class B>
static void pair_blocks_turned(int64_t rows, int64_t columns, int64_t depth, const bfloat16* a,
                               int64_t lda, const B* b, int64_t ldb, float* c, int64_t ldc,
                               bool add) {
  constexpr int64_t LD = SLICE + PAIRED;  // no power of two
  alignas(64) bfloat16 near[MOST_ROWS * LD];
  for (int64_t m = 0; m < rows; m += MOST_ROWS)
    for (int64_t t = 0; t < depth || t == 0; t += SLICE) {
      const int64_t height = at_most(rows - m, MOST_ROWS), part = at_most(depth - t, SLICE);
      turn_block(a + t * lda + m, lda, height, part, near, LD);
      const B* at = TURN ? b + t : b + t * ldb;
      pair_blocks<TURN>(height, columns, part, near, LD, at, ldb, c + m * ldc, ldc, add || t);
    }
}
}  // namespace detail

template <class B, class C>
static inline void gemm(int64_t rows, int64_t columns, int64_t depth, const bfloat16* a,
                        int64_t a_row, int64_t a_depth, const B* b, int64_t ldb, C* c, int64_t ldc,
                        bool add = false) {
  if (a_depth == 1) return detail::pair_blocks<false>(rows, columns, depth, a, a_row, b, ldb, c, ldc, add);
  if constexpr (std::is_same_v<C, float>)
    detail::pair_blocks_turned<false>(rows, columns, depth, a, a_depth, b, ldb, c, ldc, add);
  else __builtin_trap();  // no product of bfloat16 needs it: gradients of weights are float32
}

template <class B, class C>
static inline void gemm_turned(int64_t rows, int64_t columns, int64_t depth, const bfloat16* a,
                               int64_t a_row, int64_t, const B* b, int64_t ldb, C* c, int64_t ldc,
                               bool add = false, const B* = nullptr) {
  detail::pair_blocks<true>(rows, columns, depth, a, a_row, b, ldb, c, ldc, add);
}
