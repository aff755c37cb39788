// Rounding to floating-point numbers of few bits, as defined by ops/minifloat.py. The bits depend on
// every operation, so a source that includes this may not fuse multiplications and additions.
#pragma once
#include "random.h"

INLINE ivec bits(vec x) { return (ivec)x; }
INLINE ivec max(ivec a, ivec b) { return a > b ? a : b; }

// Magnitudes as integers, which have the order of the numbers, and NaN above infinity.
constexpr int32_t INFINITE = 0x7F800000;
INLINE ivec magnitude(vec x) { return (ivec)x & 0x7FFFFFFF; }
INLINE ivec finite(ivec m) { return m < INFINITE ? m : ivec{}; }

template <int STEP = LANES / 2>
INLINE int32_t largest(ivec v) {
  if constexpr (STEP == 0) return v[0];
  else {
    const auto lanes = std::make_integer_sequence<int, LANES>{};
    return largest<STEP / 2>(max(v, (ivec)detail::turned<STEP>((vec)v, lanes)));
  }
}

// Lane i is the largest of vector i, of LANES vectors, which are overwritten.
INLINE ivec largest_of_each(ivec* vectors) {
  const auto join = [](vec a, vec b) { return (vec)max((ivec)a, (ivec)b); };
  return (ivec)detail::folded_each((vec*)vectors, join);
}

// A number format: its mantissa bits, and its least exponent as float32 stores it.
struct Minifloat {
  int32_t mantissa, least;
};
constexpr Minifloat E2M1{1, 127}, E4M3{3, 121}, E5M2{2, 113};

struct Rounded {
  ivec codes;  // without the sign
  vec values;
};

// Numbers that are not negative and not above the largest, to the nearest, ties to even.
INLINE Rounded nearest(vec a, Minifloat to) {
  const ivec exponent = max(bits(a) >> 23, ivec{} + to.least);
  // 2^23 steps: adding it rounds to a step.
  const vec shift = (vec)((exponent + (23 - to.mantissa)) << 23), shifted = a + shift;
  const ivec steps = bits(shifted) - bits(shift);
  return {steps + ((exponent - to.least) << to.mantissa), shifted - shift};
}

// The same, to the next number that is not smaller.
INLINE Rounded upward(vec a, Minifloat to) {
  const Rounded r = nearest(a, to);
  const ivec exponent = max(bits(a) >> 23, ivec{} + to.least), below = r.values < a;
  const vec step = (vec)((exponent - to.mantissa) << 23);
  return {r.codes - below, below ? r.values + step : r.values};
}

// The same, to a neighbour by 16 random bits each.
INLINE Rounded stochastic(vec a, Minifloat to, const int32_t* drawn) {
  ivec random;
  memcpy(&random, drawn, sizeof random);
  const vec uniform = (__builtin_convertvector(random, vec) + 0.5f) * 0x1p-16f;
  const ivec exponent = max(bits(a) >> 23, ivec{} + to.least);
  const vec inverse = (vec)((254 + to.mantissa - exponent) << 23);
  const vec step = (vec)((exponent - to.mantissa) << 23);
  const ivec steps = __builtin_convertvector(a * inverse + uniform, ivec);
  return {steps + ((exponent - to.least) << to.mantissa),
          __builtin_convertvector(steps, vec) * step};
}

// The random bits of one row, drawn for 128 columns at a time.
struct Drawn {
  const Random& random;
  int64_t block = -1;
  uint32_t row = 0;
  int32_t numbers[RANDOM_BLOCK];

  const int32_t* at(uint32_t of, int64_t column) {
    if (column / RANDOM_BLOCK != block || of != row) {
      block = column / RANDOM_BLOCK, row = of;
      random.draw(block, row, numbers);
    }
    return numbers + column % RANDOM_BLOCK;
  }
};
