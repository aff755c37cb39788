// Values rounded to MXFP8 as defined by reference.py: 32 elements in a row or in a column share a
// power of two. The bits must equal the reference's, so nothing may be fused.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("-ffp-contract=off")
#endif
#include <cfloat>
#include <cmath>

#include "minifloat.h"
#include "team.h"

namespace {
constexpr int64_t BLOCK = 32;

struct Element {
  Minifloat format;
  float largest;
};
constexpr Element ELEMENTS[] = {{E4M3, 448.0f}, {E5M2, 57344.0f}};

// 2^(127 - code) and 2^(code - 127), where the code is that of the least power of two that brings
// the largest magnitude within the elements' range.
struct Powers {
  vec factors, units;
};

INLINE Powers powers(ivec amax, float largest) {
  const ivec bad = amax >= INFINITE;
  const ivec quotient = bits((vec)(bad ? ivec{} : amax) / largest);
  const ivec exponent = quotient >> 23, mantissa = quotient & 0x7FFFFF;
  // A subnormal number above 2^-127 rounds up to 2^-126, and to 2^-127 otherwise.
  const ivec code = exponent - (mantissa > (exponent == 0 ? ivec{} + (1 << 22) : ivec{}));
  const vec unit = (vec)(code == 0 ? ivec{} + (1 << 22) : code << 23);
  return {(vec)((254 - code) << 23), bad ? splat(NAN) : unit};
}

template <bool STOCHASTIC>
INLINE vec rounded(vec x, vec factor, vec unit, const Element& of, const int32_t* drawn) {
  const vec y = x * factor;
  vec a = (vec)magnitude(y);
  a = a < of.largest ? a : splat(of.largest);
  const Rounded r = STOCHASTIC ? stochastic(a, of.format, drawn) : nearest(a, of.format);
  vec value = r.values * unit;
  value = value > FLT_MAX ? splat(FLT_MAX) : value;  // 2^128
  return y < 0.0f ? -value : value;
}

template <bool STOCHASTIC>
void along_rows(Team& team, const float* x, float* y, int64_t rows, int64_t d, const Element& of,
                const int64_t* places, int64_t first_column, const Random& random) {
  Drawn drawn{random};
  const Range part = team.share(rows);
  for (int64_t row = part.first; row < part.last; row++)
    for (int64_t c = 0; c < d; c += BLOCK) {
      const int64_t at = row * d + c;
      ivec most{};
      for (int64_t i = 0; i < BLOCK; i += LANES) most = max(most, magnitude(load(x + at + i)));
      const Powers p = powers(ivec{} + largest(most), of.largest);
      for (int64_t i = 0; i < BLOCK; i += LANES) {
        const int32_t* noise =
            STOCHASTIC ? drawn.at((uint32_t)places[row], first_column + c + i) : nullptr;
        store(y + at + i, rounded<STOCHASTIC>(load(x + at + i), p.factors, p.units, of, noise));
      }
    }
}

template <bool STOCHASTIC>
void along_columns(Team& team, const float* x, float* y, int64_t rows, int64_t d,
                   const Element& of, const int64_t* places, int64_t first_column,
                   const Random& random) {
  int32_t numbers[BLOCK][RANDOM_BLOCK];
  const Range part = team.share(rows / BLOCK);
  for (int64_t strip = part.first; strip < part.last; strip++) {
    const int64_t row = strip * BLOCK;
    int64_t block = -1;
    for (int64_t c = 0; c < d; c += LANES) {
      const int64_t column = first_column + c;
      if (STOCHASTIC && column / RANDOM_BLOCK != block) {
        block = column / RANDOM_BLOCK;
        for (int64_t r = 0; r < BLOCK; r++)
          random.draw(block, (uint32_t)places[row + r], numbers[r]);
      }
      ivec most{};
      for (int64_t r = 0; r < BLOCK; r++) most = max(most, magnitude(load(x + (row + r) * d + c)));
      const Powers p = powers(most, of.largest);
      for (int64_t r = 0; r < BLOCK; r++) {
        const int64_t at = (row + r) * d + c;
        store(y + at, rounded<STOCHASTIC>(load(x + at), p.factors, p.units, of,
                                          numbers[r] + column % RANDOM_BLOCK));
      }
    }
  }
}

// y = x [rows, d] rounded; `places` is null to nearest.
void fake_quantize(Team& team, const float* x, float* y, const int64_t* places, int64_t rows,
                   int64_t d, int64_t element, int64_t columns, int64_t first_column,
                   int64_t seed, int64_t stream, int64_t rounds) {
  const Random random{(uint32_t)seed, (uint32_t)stream, rounds};
  const auto run = [&](auto body) {
    body(team, x, y, rows, d, ELEMENTS[element], places, first_column, random);
  };
  if (columns) places ? run(along_columns<true>) : run(along_columns<false>);
  else places ? run(along_rows<true>) : run(along_rows<false>);
}
}  // namespace

PARALLEL_KERNEL(mxfp8_fake_quantize, fake_quantize)
