// Stochastic rounding as defined by reference.py.
//
// The bits must equal the reference's, so the compiler may not fuse a multiplication and an
// addition.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("-ffp-contract=off")
#endif
#include <cmath>

#include "random.h"
#include "team.h"

namespace {
constexpr int64_t BLOCK = RANDOM_BLOCK;
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int32_t bits_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

INLINE uint16_t half_of(float x, int32_t random) {
  const int32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFF;
  random &= 0x1FFF;
  const int32_t normal = (magnitude - (112 << 23) + random) >> 13;
  const float small = std::fabs(x) * 16777216.0f + (float)random * (1.0f / 8192);
  const int32_t steps = (int32_t)(small < 2048.0f ? small : 2048.0f);
  int32_t half = magnitude < 0x38800000 ? steps : normal;
  half = half < 0x7BFF ? half : 0x7BFF;
  half = magnitude > 0x7F800000 ? 0x7E00 : half;
  return (uint16_t)(half | ((bits >> 16) & 0x8000));
}

INLINE int8_t steps_of(float x, float inverse, int32_t random) {
  float steps = std::floor(x * inverse + (float)random * (1.0f / 65536));
  if (steps != steps) return 0;  // NaN: the block's step is NaN
  steps = steps < 127.0f ? steps : 127.0f;
  return (int8_t)(steps > -127.0f ? steps : -127.0f);
}

// half [rows, size] = x [rows, size], each row at its position.
void to_half(Team& team, const float* x, const int64_t* positions, uint16_t* half, int64_t rows,
             int64_t size, int64_t seed, int64_t stream, int64_t rounds) {
  const Random random{(uint32_t)seed, (uint32_t)stream, rounds};
  const int64_t blocks = (size + BLOCK - 1) / BLOCK;
  const Range part = team.share(rows * blocks);
  for (int64_t i = part.first; i < part.last; i++) {
    const int64_t row = i / blocks, block = i % blocks, at = row * size + block * BLOCK;
    const int64_t n = smaller(BLOCK, size - block * BLOCK);
    int32_t drawn[BLOCK];
    random.draw(block, (uint32_t)positions[row], drawn);
    if (n == BLOCK)
      for (int64_t j = 0; j < BLOCK; j++) half[at + j] = half_of(x[at + j], drawn[j]);
    else
      for (int64_t j = 0; j < n; j++) half[at + j] = half_of(x[at + j], drawn[j]);
  }
}

// codes [rows, units, d_state] and steps [rows, units, blocks of d_state] of x.
void to_steps(Team& team, const float* x, const int64_t* positions, int8_t* codes, float* steps,
              int64_t rows, int64_t units, int64_t d_state, int64_t seed, int64_t stream,
              int64_t rounds) {
  const Random random{(uint32_t)seed, (uint32_t)stream, rounds};
  const int64_t groups = (d_state + BLOCK - 1) / BLOCK;
  const Range part = team.share(rows * units);
  int32_t drawn[BLOCK];
  int64_t block = -1, row_of_block = -1;
  for (int64_t i = part.first; i < part.last; i++) {
    const int64_t row = i / units, first = i % units * d_state;
    const float* ours = x + row * units * d_state;
    int8_t* to = codes + row * units * d_state;
    for (int64_t g = 0; g < groups; g++) {
      const int64_t start = first + g * BLOCK, end = first + smaller((g + 1) * BLOCK, d_state);
      // Compared as integers, NaN is the largest.
      int32_t most = 0;
      for (int64_t e = start; e < end; e++) {
        const int32_t magnitude = bits_of(ours[e]) & 0x7FFFFFFF;
        most = magnitude > most ? magnitude : most;
      }
      float largest;
      memcpy(&largest, &most, 4);
      const bool is_zero = largest < 0x1p-100f;
      const float inverse = is_zero ? 0.0f : 127.0f / largest;
      steps[i * groups + g] = is_zero ? 0.0f : largest / 127.0f;
      for (int64_t e = start; e < end;) {
        if (e / BLOCK != block || row != row_of_block) {
          block = e / BLOCK, row_of_block = row;
          random.draw(block, (uint32_t)positions[row], drawn);
        }
        const int64_t until = smaller(end, (block + 1) * BLOCK);
        for (; e < until; e++) to[e] = steps_of(ours[e], inverse, drawn[e - block * BLOCK]);
      }
    }
  }
}
}  // namespace

PARALLEL_KERNEL(to_float16, to_half)
PARALLEL_KERNEL(to_int8, to_steps)
