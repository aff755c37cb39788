// NVFP4 quantization as defined by ops/nvfp4/reference.py, in two passes over x: the largest
// magnitude (and the Hadamard transform), then scales and elements. The scales of 16 blocks are
// computed together. Rows of x are `ld` elements apart, and so are those of values.
//
// The bits must equal the reference's, so the compiler may not fuse a multiplication and an
// addition here, while products need it to.
#pragma once
#include <cfloat>
#include <cmath>

#include "exact.h"
#include "minifloat.h"
#include "team.h"

EXACT_BEGIN
namespace nvfp4 {
constexpr int64_t BLOCK = 16, PARTS = BLOCK / LANES, CHUNK = BLOCK * BLOCK;

// What depends on the tensor's largest magnitude alone, which is mapped to `most`.
struct Global {
  float encode, sixth, decode, scale;
  explicit Global(float amax, float most = 6.0f * 448.0f) {
    encode = amax == 0 ? 1.0f : most / amax;
    encode = encode < FLT_MAX ? encode : FLT_MAX;
    sixth = encode * (1.0f / 6.0f);
    decode = 1.0f / encode;
    scale = amax / most;
    scale = amax == 0 ? 0.0f : scale < 0x1p-128f ? 0x1p-128f : scale;
  }
};

// Of LANES blocks: codes of the scales, what their elements are multiplied by, and their size.
struct Scales {
  ivec codes;
  vec factors, units;
};

template <bool UP>
INLINE Scales scales(ivec amax, const Global& g) {
  const ivec bad = amax >= INFINITE;
  vec wanted = (vec)(bad ? ivec{} : amax) * g.sixth;
  wanted = wanted < 448.0f ? wanted : splat(448.0f);
  const Rounded scale = UP ? upward(wanted, E4M3) : nearest(wanted, E4M3);
  vec factors = 1.0f / (scale.values * g.decode);
  factors = factors < FLT_MAX ? factors : splat(FLT_MAX);
  vec units = scale.values * g.scale;
  units = bad ? splat(NAN) : units;
  return {bad ? ivec{} + 0x7F : scale.codes, bad ? vec{} : factors, units};
}

// Rounding of elements that are scaled already: codes and numbers, with signs.
template <bool STOCHASTIC>
INLINE Rounded element(vec y, const int32_t* drawn) {
  vec a = (vec)magnitude(y);
  a = a < 6.0f ? a : splat(6.0f);
  const Rounded r = STOCHASTIC ? stochastic(a, E2M1, drawn) : nearest(a, E2M1);
  const ivec negative = y < 0.0f;
  return {r.codes + (negative & 8), (vec)(bits(r.values) | (negative & (int32_t)0x80000000))};
}

// Two codes a byte, of LANES lanes.
INLINE void pack(ivec codes, uint8_t* to) {
  typedef uint8_t bytes __attribute__((vector_size(LANES / 2)));
  const pairs both = (pairs)codes;
  const bytes packed = __builtin_convertvector(both | both >> 28, bytes);
  memcpy(to, &packed, sizeof packed);
}

// amax[b] = the largest finite magnitude of each tensor of the batch.
static void raise(float& to, int32_t most) {
  int32_t& bits = *(int32_t*)&to;
  int32_t found = __atomic_load_n(&bits, __ATOMIC_RELAXED);
  while (found < most && !__atomic_compare_exchange_n(&bits, &found, most, true, __ATOMIC_RELAXED,
                                                      __ATOMIC_RELAXED)) {
  }
}

static void find_amax(Team& team, const float* x, float* amax, int64_t rows, int64_t of_one,
                      int64_t d, int64_t ld) {
  const Range part = team.share(rows);
  for (int64_t row = part.first; row < part.last;) {
    const int64_t tensor = row / of_one, end = (tensor + 1) * of_one;
    const int64_t until = end < part.last ? end : part.last;
    ivec most[4]{};
    const int64_t lines = ld == d ? 1 : until - row, n = ld == d ? (until - row) * d : d;
    for (int64_t line = 0; line < lines; line++) {
      const float* from = x + (row + line) * ld;
      int64_t i = 0;
      for (; i + 4 * LANES <= n; i += 4 * LANES)
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++)
          most[k] = max(most[k], finite(magnitude(load(from + i + k * LANES))));
      for (; i < n; i += LANES) most[0] = max(most[0], finite(magnitude(load(from + i))));
    }
    raise(amax[tensor], largest(max(max(most[0], most[1]), max(most[2], most[3]))));
    row = until;
  }
}

struct Output {
  uint8_t *codes, *scales;  // packed codes and scales, or
  float* values;            // the values that they stand for
};

template <bool STOCHASTIC>
INLINE void finish(vec x, vec factor, vec unit, const int32_t* drawn, int64_t at,
                   const Output& out) {
  const Rounded e = element<STOCHASTIC>(x * factor, drawn);
  if (out.values) store(out.values + at, e.values * unit);
  else pack(unit == unit ? e.codes : ivec{}, out.codes + at / 2);
}

// Blocks along rows, `TILE` rows high.
template <int64_t TILE, bool STOCHASTIC>
static void along_rows(Team& team, const float* x, const float* amax, const Output& out,
                       int64_t rows, int64_t of_one, int64_t d, int64_t ld, const int64_t* places,
                       int64_t first_column, const Random& random) {
  Drawn drawn{random};
  const Range part = team.share(rows / TILE);
  int64_t tensor = -1;
  Global g(0);
  for (int64_t strip = part.first; strip < part.last; strip++) {
    const int64_t row = strip * TILE;
    if (row / of_one != tensor) tensor = row / of_one, g = Global(amax[tensor]);
    for (int64_t c = 0; c < d; c += CHUNK) {
      const int64_t blocks = (d - c < CHUNK ? d - c : CHUNK) / BLOCK;
      ivec most[BLOCK]{};
      for (int64_t b = 0; b < blocks; b++)
        for (int64_t r = 0; r < TILE; r++)
          for (int64_t p = 0; p < PARTS; p++)
            most[b] = max(most[b],
                          magnitude(load(x + (row + r) * ld + c + b * BLOCK + p * LANES)));
      float factors[BLOCK], units[BLOCK];
      for (int64_t p = 0; p < PARTS; p++) {
        const ivec m = largest_of_each(most + p * LANES);
        const Scales s = scales<STOCHASTIC>(m, g);
        store(factors + p * LANES, s.factors);
        store(units + p * LANES, s.units);
        if (out.scales)
          for (int64_t i = p * LANES; i < (p + 1) * LANES && i < blocks; i++)
            out.scales[(strip * d + c) / BLOCK + i] = (uint8_t)s.codes[i - p * LANES];
      }
      for (int64_t r = 0; r < TILE; r++)
        for (int64_t b = 0; b < blocks; b++)
          for (int64_t p = 0; p < PARTS; p++) {
            const int64_t column = c + b * BLOCK + p * LANES, at = (row + r) * ld + column;
            const int32_t* noise =
                STOCHASTIC ? drawn.at((uint32_t)places[row + r], first_column + column) : nullptr;
            finish<STOCHASTIC>(load(x + at), splat(factors[b]), splat(units[b]), noise, at, out);
          }
    }
  }
}

INLINE vec to_bfloat16(vec x) {
  const ivec b = bits(x), rounded = (b + 0x7FFF + ((b >> 16) & 1)) & (int32_t)0xFFFF0000;
  return x == x ? (vec)rounded : x;
}

// y = the Hadamard transform of each 16 rows of x, whose largest magnitude is found on the way.
static void transform(Team& team, const float* x, const float* signs, float* y, float* amax,
                      int64_t rows, int64_t of_one, int64_t d, int64_t ld, bool given,
                      bool narrow) {
  const Range part = team.share(rows / BLOCK);
  for (int64_t strip = part.first; strip < part.last; strip++) {
    const float* from = x + strip * BLOCK * ld;
    float* to = y + strip * BLOCK * ld;
    ivec most{};
    for (int64_t c = 0; c < d; c += LANES) {
      vec v[BLOCK];
#pragma GCC unroll 16
      for (int i = 0; i < BLOCK; i++) v[i] = load(from + i * ld + c) * (signs[i] * 0.25f);
#pragma GCC unroll 4
      for (int h = 1; h < BLOCK; h *= 2)
#pragma GCC unroll 8
        for (int k = 0; k < BLOCK / 2; k++) {
          const int i = k / h * 2 * h + k % h;
          const vec a = v[i], b = v[i + h];
          v[i] = a + b, v[i + h] = a - b;
        }
#pragma GCC unroll 16
      for (int i = 0; i < BLOCK; i++) {
        if (narrow) v[i] = to_bfloat16(v[i]);
        most = max(most, finite(magnitude(v[i])));
        store(to + i * ld + c, v[i]);
      }
    }
    if (!given) raise(amax[strip * BLOCK / of_one], largest(most));
  }
}

// Blocks along columns: each of the LANES columns of a strip of 16 rows has a scale of its own.
template <bool STOCHASTIC>
static void along_columns(Team& team, const float* x, const float* amax, const Output& out,
                          int64_t rows, int64_t of_one, int64_t d, int64_t ld,
                          const int64_t* places, int64_t first_column, const Random& random) {
  const Range part = team.share(rows / BLOCK);
  int32_t numbers[BLOCK][RANDOM_BLOCK];
  for (int64_t strip = part.first; strip < part.last; strip++) {
    const int64_t row = strip * BLOCK;
    const Global g(amax[row / of_one]);
    int64_t block = -1;
    for (int64_t c = 0; c < d; c += LANES) {
      if (STOCHASTIC && (first_column + c) / RANDOM_BLOCK != block) {
        block = (first_column + c) / RANDOM_BLOCK;
        for (int64_t r = 0; r < BLOCK; r++)
          random.draw(block, (uint32_t)places[row + r], numbers[r]);
      }
      ivec most{};
      for (int64_t r = 0; r < BLOCK; r++) most = max(most, magnitude(load(x + (row + r) * ld + c)));
      const Scales s = scales<STOCHASTIC>(most, g);
      for (int64_t r = 0; r < BLOCK; r++) {
        const int64_t at = (row + r) * ld + c;
        finish<STOCHASTIC>(load(x + at), s.factors, s.units,
                           numbers[r] + (first_column + c) % RANDOM_BLOCK, at, out);
      }
    }
  }
}
}  // namespace nvfp4
EXACT_END
