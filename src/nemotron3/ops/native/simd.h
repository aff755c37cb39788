// Vectors of the processor's own width, in the vector extension that GCC and Clang share.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
// The same in memory, aligned to an element only.
typedef float vec_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float* p) { return *(const vec_unaligned*)p; }
INLINE void store(float* p, vec v) { *(vec_unaligned*)p = v; }
INLINE vec splat(float x) { return x - vec{}; }

// The first n of LANES elements; the others are zero.
INLINE vec load_part(const float* p, int64_t n) {
  vec v{};
  memcpy(&v, p, 4 * n);
  return v;
}
INLINE void store_part(float* p, vec v, int64_t n) { memcpy(p, &v, 4 * n); }

INLINE vec max(vec a, vec b) { return a > b ? a : b; }
INLINE vec min(vec a, vec b) { return a < b ? a : b; }

namespace detail {
template <int STEP, int... I>
INLINE vec turned(vec v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, ((I + STEP) % LANES)...);
}
// Reduce all lanes by `join`, half onto half.
template <int STEP = LANES / 2, class Join>
INLINE float folded(vec v, Join join) {
  if constexpr (STEP == 0) return v[0];
  else return folded<STEP / 2>(join(v, turned<STEP>(v, std::make_integer_sequence<int, LANES>{})), join);
}
}  // namespace detail

INLINE float sum(vec v) {
  return detail::folded(v, [](vec a, vec b) { return a + b; });
}
INLINE float largest(vec v) {
  return detail::folded(v, [](vec a, vec b) { return max(a, b); });
}

// e^x with a relative error of 1e-7: x = n ln 2 + r, and e^r by its series. NaN stays NaN; beyond
// the range of float32 the result is 0 or the largest power of two.
INLINE vec exp(vec x) {
  x = x < -87.3f ? splat(-87.3f) : x;
  x = x > 88.3f ? splat(88.3f) : x;
  const vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vec n = (x * 1.44269504088896341f + shift) - shift;
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
  return p * (vec)power;
}

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }

namespace detail {
template <int STEP, int... I>
INLINE vec low(vec a, vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I & STEP) ? LANES + (I ^ STEP) : I)...);
}
template <int STEP, int... I>
INLINE vec high(vec a, vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I & STEP) ? LANES + I : (I ^ STEP))...);
}
template <int STEP>
INLINE void exchange(vec (&rows)[LANES]) {
  using lanes = std::make_integer_sequence<int, LANES>;
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++)
    if (!(i & STEP)) {
      const vec a = rows[i], b = rows[i | STEP];
      rows[i] = low<STEP>(a, b, lanes{});
      rows[i | STEP] = high<STEP>(a, b, lanes{});
    }
}

// Lane i reduces vector i by `join`, of LANES vectors, which are overwritten.
template <int STEP = 1, class Join>
INLINE vec folded_each(vec* v, Join join) {
  using lanes = std::make_integer_sequence<int, LANES>;
#pragma GCC unroll 8
  for (int i = 0; i < LANES; i += 2 * STEP) {
    const vec a = v[i], b = v[i + STEP];
    v[i] = join(low<STEP>(a, b, lanes{}), high<STEP>(a, b, lanes{}));
  }
  if constexpr (2 * STEP < LANES) return folded_each<2 * STEP>(v, join);
  else return v[0];
}
}  // namespace detail

// Lane i is the sum of vector i, of LANES vectors, which are overwritten.
INLINE vec sum_of_each(vec* vectors) {
  return detail::folded_each(vectors, [](vec a, vec b) { return a + b; });
}

// Transpose a square of LANES rows in place.
INLINE void transpose(vec (&rows)[LANES]) {
  detail::exchange<1>(rows);
  detail::exchange<2>(rows);
#if defined(__AVX__)
  detail::exchange<4>(rows);
#endif
#if defined(__AVX512F__)
  detail::exchange<8>(rows);
#endif
}

// to[j][i] = from[i][j] for i < rows, j < columns.
INLINE void transpose(const float* from, int64_t ld_from, int64_t rows, int64_t columns, float* to,
                      int64_t ld_to) {
  int64_t i = 0;
  for (; i + LANES <= rows; i += LANES) {
    int64_t j = 0;
    for (; j + LANES <= columns; j += LANES) {
      vec square[LANES];
#pragma GCC unroll 16
      for (int r = 0; r < LANES; r++) square[r] = load(from + (i + r) * ld_from + j);
      transpose(square);
#pragma GCC unroll 16
      for (int r = 0; r < LANES; r++) store(to + (j + r) * ld_to + i, square[r]);
    }
    for (; j < columns; j++)
      for (int r = 0; r < LANES; r++) to[j * ld_to + i + r] = from[(i + r) * ld_from + j];
  }
  for (; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) to[j * ld_to + i] = from[i * ld_from + j];
}
