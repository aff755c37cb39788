// Small matrix products on one thread: C = A B, for operands that stay in the cache.
//
// B is read in vectors along its rows and A an element at a time, so A may have any strides: a
// transposed A costs nothing, and a transposed B is transposed back a strip at a time
// (`gemm_turned`). For many rows of A, a strip of B is packed even if its layout is right, since
// rows that are a power of two apart would all map to a few cache sets. Every element of C is
// summed over t in the same order for all shapes, so a row's result does not depend on the number
// of rows.
#pragma once
#include <type_traits>

#include "simd.h"
#include "weights.h"

namespace detail {
constexpr int ROWS = LANES == 8 ? 3 : 6;  // ROWS x VECTORS sums fit in the registers
constexpr int VECTORS = 4;
constexpr int64_t WIDTH = VECTORS * LANES;  // of a strip of B
constexpr int64_t DEPTH = 128;  // rows of a strip of B that stay in the L1 cache
constexpr int64_t WORTH_PACKING = 64;  // rows of A from which packing them pays off

constexpr int64_t LINE = 16;  // elements of a cache line

// R rows and V vectors of C; `tail` is the number of elements in the last vector. The memory at
// `ahead` is prefetched meanwhile, a cache line at each step, unless it is null.
template <int R, int V, bool ADD>
INLINE void tile(int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b,
                 int64_t ldb, float* c, int64_t ldc, int64_t tail, const float* ahead) {
  vec sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const float* at = c + r * ldc + v * LANES;
      if (!ADD) sums[r][v] = vec{};
      else sums[r][v] = v + 1 < V || tail == LANES ? load(at) : load_part(at, tail);
    }
  const auto multiply = [&](bool whole, bool ask) __attribute__((always_inline)) {
    for (int64_t t = 0; t < depth; t++) {
      if (ask) __builtin_prefetch(ahead + t * LINE, 0, 2);
      vec row[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        const float* at = b + t * ldb + v * LANES;
        row[v] = v + 1 < V || whole ? load(at) : load_part(at, tail);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const vec x = splat(a[r * a_row + t * a_depth]);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sums[r][v] += x * row[v];
      }
    }
  };
  if (tail < LANES) multiply(false, false);
  else if (ahead) multiply(true, true);
  else multiply(true, false);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      float* at = c + r * ldc + v * LANES;
      if (v + 1 < V || tail == LANES) store(at, sums[r][v]);
      else store_part(at, sums[r][v], tail);
    }
}

template <int V, bool ADD>
static void strip(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_depth,
                  const float* b, int64_t ldb, float* c, int64_t ldc, int64_t tail,
                  const float* ahead) {
  constexpr int64_t ASKING = WIDTH / LINE * ROWS;  // rows after which a strip is prefetched
  int64_t r = 0;
  for (; r + ROWS <= rows; r += ROWS) {
    tile<ROWS, V, ADD>(depth, a + r * a_row, a_row, a_depth, b, ldb, c + r * ldc, ldc, tail, ahead);
    ahead = ahead && r + ROWS < ASKING ? ahead + depth * LINE : nullptr;
  }
  a += r * a_row;
  c += r * ldc;
  switch (rows - r) {
    case 5: tile<5, V, ADD>(depth, a, a_row, a_depth, b, ldb, c, ldc, tail, ahead); break;
    case 4: tile<4, V, ADD>(depth, a, a_row, a_depth, b, ldb, c, ldc, tail, ahead); break;
    case 3: tile<3, V, ADD>(depth, a, a_row, a_depth, b, ldb, c, ldc, tail, ahead); break;
    case 2: tile<2, V, ADD>(depth, a, a_row, a_depth, b, ldb, c, ldc, tail, ahead); break;
    case 1: tile<1, V, ADD>(depth, a, a_row, a_depth, b, ldb, c, ldc, tail, ahead); break;
  }
}

// Pack `depth` rows of B, `width` elements of each.
INLINE void pack(const float* b, int64_t ldb, int64_t depth, int64_t width, float* to) {
  for (int64_t t = 0; t < depth; t++, b += ldb, to += WIDTH) {
    if (width < WIDTH) {
      memcpy(to, b, 4 * width);
      continue;
    }
    vec row[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) row[v] = load(b + v * LANES);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) store(to + v * LANES, row[v]);
  }
}

// The same of a weight that is decoded on the way.
template <class W>
INLINE void pack(W b, int64_t ldb, int64_t depth, int64_t width, float* to) {
  for (int64_t t = 0; t < depth; t++, to += WIDTH) {
    const auto row = elements(b) + t * ldb;
    for (int64_t n = 0; n < width; n += LANES) {
      const int64_t left = width - n;
      store(to + n, scaled(b, t, left < LANES ? load_part(row + n, left) : load(row + n)));
    }
  }
}

// Pack `width` rows of a weight, `depth` elements of each, transposed.
INLINE void turn(const float* b, int64_t ldb, int64_t depth, int64_t width, float* to) {
  transpose(b, ldb, width, depth, to, WIDTH);
}
template <class W>
INLINE void turn(W b, int64_t ldb, int64_t depth, int64_t width, float* to) {
  alignas(64) float rows[WIDTH * DEPTH];
  for (int64_t n = 0; n < width; n++) {
    const auto row = elements(b) + n * ldb;
    for (int64_t t = 0; t < depth; t += LANES) {
      const int64_t left = depth - t;
      store(rows + n * DEPTH + t,
            scaled(b, n, left < LANES ? load_part(row + t, left) : load(row + t)));
    }
  }
  transpose(rows, DEPTH, width, depth, to, WIDTH);
}

template <bool ADD, bool TURN, class B>
static void block(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row,
                  int64_t a_depth, B b, int64_t ldb, float* c, int64_t ldc, const float* ahead) {
  alignas(64) float packed[DEPTH * WIDTH];
  constexpr bool PLAIN = std::is_pointer_v<B>;
  const bool copy = TURN || !PLAIN || (rows >= WORTH_PACKING && ldb > WIDTH);
  for (int64_t n = 0; n < columns; n += WIDTH) {
    const int64_t left = columns - n < WIDTH ? columns - n : WIDTH;
    const int64_t vectors = (left + LANES - 1) / LANES, tail = left - (vectors - 1) * LANES;
    const float* bn = packed;
    if constexpr (TURN) turn(from_row(b, n, ldb), ldb, depth, left, packed);
    else if constexpr (!PLAIN) pack(from_column(b, n), ldb, depth, left, packed);
    else if (copy) pack(b + n, ldb, depth, left, packed);
    else bn = b + n;
    const int64_t ldbn = copy ? WIDTH : ldb;
    float* cn = c + n;
    switch (vectors) {
      case 4: strip<4, ADD>(rows, depth, a, a_row, a_depth, bn, ldbn, cn, ldc, tail, ahead); break;
      case 3: strip<3, ADD>(rows, depth, a, a_row, a_depth, bn, ldbn, cn, ldc, tail, ahead); break;
      case 2: strip<2, ADD>(rows, depth, a, a_row, a_depth, bn, ldbn, cn, ldc, tail, ahead); break;
      case 1: strip<1, ADD>(rows, depth, a, a_row, a_depth, bn, ldbn, cn, ldc, tail, ahead); break;
    }
  }
}

template <bool TURN, class B>
INLINE void blocks(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row,
                   int64_t a_depth, B b, int64_t ldb, float* c, int64_t ldc, bool add,
                   const float* next = nullptr) {
  for (int64_t t = 0; t < depth || t == 0; t += DEPTH) {
    const int64_t n = depth - t < DEPTH ? depth - t : DEPTH;
    const float* at = a + t * a_depth;
    const B bt = TURN ? from_column(b, t) : from_row(b, t, ldb);
    const float* ahead = next ? next + t * WIDTH : nullptr;
    if (add || t) block<true, TURN>(rows, columns, n, at, a_row, a_depth, bt, ldb, c, ldc, ahead);
    else block<false, TURN>(rows, columns, n, at, a_row, a_depth, bt, ldb, c, ldc, ahead);
  }
}
}  // namespace detail

constexpr int64_t TILE_ROWS = detail::ROWS;

// C[m][n] = sum over t of A[m * a_row + t * a_depth] * B[t * ldb + n], added to C if `add`.
static inline void gemm(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row,
                        int64_t a_depth, const float* b, int64_t ldb, float* c, int64_t ldc,
                        bool add = false) {
  detail::blocks<false>(rows, columns, depth, a, a_row, a_depth, b, ldb, c, ldc, add);
}

// The same with codes.
template <class W, class = std::enable_if_t<!std::is_pointer_v<W>>>
static inline void gemm(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row,
                        int64_t a_depth, W b, int64_t ldb, float* c, int64_t ldc,
                        bool add = false) {
  detail::blocks<false>(rows, columns, depth, a, a_row, a_depth, b, ldb, c, ldc, add);
}

// The same with B[n * ldb + t], one strip of columns after another. With few rows the time goes
// into reading B: where strips are adjacent in memory, the next is prefetched while one is
// multiplied, and with the last one the memory at `next`.
static inline void gemm_turned(int64_t rows, int64_t columns, int64_t depth, const float* a,
                               int64_t a_row, int64_t a_depth, const float* b, int64_t ldb,
                               float* c, int64_t ldc, bool add = false,
                               const float* next = nullptr) {
  using detail::WIDTH;
  for (int64_t n = 0; n < columns; n += WIDTH) {
    const int64_t width = columns - n < WIDTH ? columns - n : WIDTH;
    const float* strip = b + n * ldb;
    const float* following = n + WIDTH < columns ? strip + WIDTH * ldb : next;
    detail::blocks<true>(rows, width, depth, a, a_row, a_depth, strip, ldb, c + n, ldc, add,
                         ldb == depth ? following : nullptr);
  }
}

// The same with codes, which are so few bytes that prefetching does not pay off.
template <class W>
static inline void gemm_turned(int64_t rows, int64_t columns, int64_t depth, const float* a,
                               int64_t a_row, int64_t a_depth, W b, int64_t ldb, float* c,
                               int64_t ldc, bool add = false, W = {}) {
  detail::blocks<true>(rows, columns, depth, a, a_row, a_depth, b, ldb, c, ldc, add);
}

// Most rows of A in a block, if each row has `width` elements: as many as half of an L2 cache
// holds, since every block loads B again.
constexpr int64_t most_rows(int64_t width) {
  constexpr int64_t CACHED = 1 << 17;  // elements: half of a megabyte
  constexpr int64_t FEWEST = 120, MOST = 480;  // whole tiles; with fewer rows B costs too much
  const int64_t fit = CACHED / width / TILE_ROWS * TILE_ROWS;
  return fit < FEWEST ? FEWEST : fit < MOST ? fit : MOST;
}

// Rows of a block if `rows` are split into blocks: equal blocks up to rounding to tiles, and at
// least one for each of `parts`.
constexpr int64_t block_rows(int64_t rows, int64_t width, int64_t parts = 1) {
  if (rows == 0) return TILE_ROWS;
  const int64_t most = most_rows(width) * parts, blocks = (rows + most - 1) / most * parts;
  return (rows + blocks * TILE_ROWS - 1) / (blocks * TILE_ROWS) * TILE_ROWS;
}

// Products with a lower triangle, a tile of rows at a time. Where the triangle is an operand, the
// rows of a tile must be zero beyond the diagonal up to the tile's end.

// C = A B for a lower triangle A [rows, rows].
static inline void gemm_lower(int64_t rows, int64_t columns, const float* a, int64_t lda,
                              const float* b, int64_t ldb, float* c, int64_t ldc,
                              bool add = false) {
  for (int64_t r = 0; r < rows; r += TILE_ROWS) {
    const int64_t n = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
    gemm(n, columns, r + n, a + r * lda, lda, 1, b, ldb, c + r * ldc, ldc, add);
  }
}

// C = A^T B for a lower triangle A [rows, rows].
static inline void gemm_lower_turned(int64_t rows, int64_t columns, const float* a, int64_t lda,
                                     const float* b, int64_t ldb, float* c, int64_t ldc,
                                     bool add = false) {
  for (int64_t r = 0; r < rows; r += TILE_ROWS) {
    const int64_t n = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
    gemm(n, columns, rows - r, a + r * lda + r, 1, lda, b + r * ldb, ldb, c + r * ldc, ldc, add);
  }
}

// The lower triangle of C [rows, rows] = A B. Whole vectors are written, so some elements beyond it
// change, and rows of B and C must be padded to whole vectors.
static inline void gemm_to_lower(int64_t rows, int64_t depth, const float* a, int64_t lda,
                                 const float* b, int64_t ldb, float* c, int64_t ldc) {
  for (int64_t r = 0; r < rows; r += TILE_ROWS) {
    const int64_t n = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
    const int64_t columns = (r + n + LANES - 1) / LANES * LANES;
    gemm(n, columns, depth, a + r * lda, lda, 1, b, ldb, c + r * ldc, ldc);
  }
}
