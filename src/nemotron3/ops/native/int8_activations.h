// Products with weights in few bits and activations that are rounded to int8.
//
// A block of 16 inputs of a row of x has a scale, 1/127 of its largest magnitude, so a product of a
// block is a sum of integers and then two multiplications by scales:
//
//   y = sum over blocks of (scale of x * scale of W) * sum of (code of x * code of W)
//
// Codes of W are those of int8, or twice an E2M1 number, which is an integer from -12 to 12. The
// sums of integers are exact on every processor, and one result has one order of summation for any
// number of rows, so a row's result does not depend on those beside it.
//
// A row is rounded once for all outputs, into groups of as many inputs as 64 bytes of codes of W
// have, in the order in which these are unpacked. A group has 16 sums, of which each is of
// neighbouring inputs of one block: the lanes of the instruction that adds four products of bytes.
// That instruction takes one operand without signs, so codes of W are moved up, and `offsets` take
// this back.
#pragma once
#include <cmath>

#include "gemm.h"
#include "packed.h"
#include "rows.h"
#include "scratch.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_VNNI 1
#endif

// A weight whose products round their activations.
template <class W>
struct Int8Activations : W {};

namespace detail {
constexpr int64_t LINE_BYTES = 64;
constexpr int64_t SUMS = 16;  // of a group

typedef float sums_float __attribute__((vector_size(4 * SUMS)));
typedef int32_t sums_int __attribute__((vector_size(4 * SUMS)));

// Inputs of one row of activations.
template <int64_t INPUTS>
struct alignas(64) Group {
  int8_t codes[INPUTS];
  sums_int offsets;
  sums_float scales;
};

constexpr int64_t PANEL = 1 << 14;     // bytes of W that stay in the L1 cache beside some rows of x
constexpr int64_t ROUNDED = 1 << 18;   // bytes of rounded rows that stay in the L2 cache
constexpr float MOST_CODE = 127.0f;
constexpr float LEAST = power_of_two(-100);  // a block of smaller numbers is zero

// The factor that makes codes of a block, and its scale, from its largest magnitude: that of a
// block with NaN is NaN, which then reaches the result.
INLINE float factor_of(float largest) { return largest < LEAST ? 0.0f : MOST_CODE / largest; }
INLINE float scale_of(float largest) { return largest < LEAST ? 0.0f : largest / MOST_CODE; }

// Round a block of n numbers to 16 codes, and return its scale. Magnitudes are compared as
// integers, whose order is that of floats with NaN as the largest.
INLINE float round_block(const float* x, int64_t n, int8_t* codes) {
#if defined(__AVX512F__)
  const __m512 block = _mm512_maskz_loadu_ps((1u << n) - 1, x);
  const __m512i magnitudes = _mm512_and_si512((__m512i)block, _mm512_set1_epi32(0x7fffffff));
  const float largest = folded((vec)magnitudes, [](vec a, vec b) {
    return (vec)((ivec)a > (ivec)b ? (ivec)a : (ivec)b);
  });
  const __m512 scaled = block * _mm512_set1_ps(factor_of(largest));
  const __m512i rounded = _mm512_maskz_cvtps_epi32(-1, scaled);
  _mm_storeu_si128((__m128i*)codes, _mm512_maskz_cvtepi32_epi8(-1, rounded));
#else
  float block[BLOCK]{};
  int32_t bits[BLOCK], most = 0;
  memcpy(block, x, 4 * n);
  memcpy(bits, block, sizeof bits);
  for (int i = 0; i < BLOCK; i++) {
    const int32_t magnitude = bits[i] & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  float largest;
  memcpy(&largest, &most, 4);
  const float factor = factor_of(largest);
  for (int i = 0; i < BLOCK; i++)
    codes[i] = (int8_t)(int32_t)__builtin_nearbyintf(block[i] * factor);
#endif
  return scale_of(largest);
}

// Codes of four bits, as the integers that are twice their numbers.
constexpr int8_t TWICE_E2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// The n elements that are left of a row, in a buffer that is zero beyond them.
template <class T, size_t N>
INLINE const T* part_of(const T* from, int64_t n, T (&buffer)[N]) {
  memset(buffer, 0, sizeof buffer);
  memcpy(buffer, from, n * sizeof(T));
  return buffer;
}

// How the codes of a weight are unpacked: INPUTS of a group, and
//   place(...)    puts the codes of a block of x in their order,
//   offsets(x)    what the sums of a group begin with, from its codes,
//   Unpacked(...) a group of W,
//   sums(x)       its sums of integers with a group of x.
template <class W>
struct Unpacked;

#if defined(HAS_VNNI)
INLINE sums_int dot_bytes(sums_int to, __m512i w, const int8_t* x) {
  return (sums_int)_mm512_dpbusd_epi32((__m512i)to, w, _mm512_load_si512(x));
}
#elif defined(__AVX2__)
// The same with signs: 32 products of bytes, whose pairs fit in 16 bits.
INLINE __m256i dot_bytes(__m256i w, const int8_t* x) {
  const __m256i with_sign = _mm256_sign_epi8(_mm256_load_si256((const __m256i*)x), w);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), with_sign);
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
INLINE sums_int join(__m256i low, __m256i high) {
  sums_int both;
  memcpy(&both, &low, 32);
  memcpy((char*)&both + 32, &high, 32);
  return both;
}
#endif

template <>
struct Unpacked<NVFP4Rows> {
  static constexpr int64_t INPUTS = 2 * LINE_BYTES;
  using Rounded = Group<INPUTS>;
  // Put the codes of a block where they belong: even inputs are in the low halves of bytes.
  static void place(const int8_t* block, int64_t at, int8_t* codes) {
    for (int64_t i = 0; i < BLOCK / 2; i++) {
      codes[at / 2 + i] = block[2 * i];
      codes[LINE_BYTES + at / 2 + i] = block[2 * i + 1];
    }
  }
  static constexpr float FACTOR = 0.5f * FP8_FACTOR;  // what the sums leave out
  sums_float scales;
#if defined(HAS_VNNI)
  static sums_int offsets(const Rounded& x) {
    const __m512i ones = _mm512_set1_epi8(1);
    return -12 * dot_bytes(dot_bytes(sums_int{}, ones, x.codes), ones, x.codes + LINE_BYTES);
  }
  __m512i even, odd;
  [[gnu::always_inline]] Unpacked(NVFP4Rows w, int64_t at, int64_t n) {
    const __m512i table = _mm512_maskz_broadcast_i32x4(
        -1, _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const __m512i half = _mm512_set1_epi8(15);
    __m512i codes;
    __m128i blocks;
    if (n == INPUTS) {
      codes = _mm512_loadu_si512(w.codes + at / 2);
      blocks = _mm_loadl_epi64((const __m128i*)(w.blocks + at / BLOCK));
    } else {
      codes = _mm512_maskz_loadu_epi8((1ull << n / 2) - 1, w.codes + at / 2);
      blocks = _mm_maskz_loadu_epi8((1u << n / BLOCK) - 1, w.blocks + at / BLOCK);
    }
    even = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, half));
    odd = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(codes, 4), half));
    // Every scale twice, in the upper halves of 16 bits; half precision as in packed.h.
    const __m256i places = _mm256_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3,
                                            -1, 4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7);
    const __m256i twice = _mm256_shuffle_epi8(_mm256_broadcastq_epi64(blocks), places);
    const __m256i halves =
        _mm256_and_si256(_mm256_srai_epi16(twice, 1), _mm256_set1_epi16((short)0xbf80));
    scales = (sums_float)_mm512_maskz_cvtph_ps(-1, halves);
  }
  [[gnu::always_inline]] sums_int sums(const Rounded& x) const {
    return dot_bytes(dot_bytes(x.offsets, even, x.codes), odd, x.codes + LINE_BYTES);
  }
#else
  static sums_int offsets(const Rounded&) { return sums_int{}; }
  const uint8_t *codes, *blocks;
  uint8_t last_codes[LINE_BYTES], last_blocks[INPUTS / BLOCK];
  [[gnu::always_inline]] Unpacked(NVFP4Rows w, int64_t at, int64_t n)
      : codes(w.codes + at / 2), blocks(w.blocks + at / BLOCK) {
    if (n < INPUTS) {
      codes = part_of(codes, n / 2, last_codes);
      blocks = part_of(blocks, n / BLOCK, last_blocks);
    }
#if defined(__AVX2__) && defined(__F16C__)
    const __m128i upper = _mm_unpacklo_epi8(__m128i{}, _mm_loadl_epi64((const __m128i*)blocks));
    const __m256i each = (__m256i)_mm256_cvtph_ps(
        _mm_and_si128(_mm_srai_epi16(upper, 1), _mm_set1_epi16((short)0xbf80)));
    const __m256i pairs = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    scales = (sums_float)join(
        _mm256_permutevar8x32_epi32(each, pairs),
        _mm256_permutevar8x32_epi32(each, _mm256_add_epi32(pairs, _mm256_set1_epi32(4))));
#else
    for (int64_t s = 0; s < SUMS; s++) scales[s] = E4M3.values[blocks[s / 2]] / FP8_FACTOR;
#endif
  }
#if defined(__AVX2__)
  [[gnu::always_inline]] sums_int sums(const Rounded& x) const {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)TWICE_E2M1));
    const __m256i half = _mm256_set1_epi8(15);
    __m256i parts[2];
    for (int h = 0; h < 2; h++) {
      const __m256i pairs = _mm256_loadu_si256((const __m256i*)(codes + 32 * h));
      const __m256i even = _mm256_shuffle_epi8(table, _mm256_and_si256(pairs, half));
      const __m256i upper = _mm256_srli_epi16(pairs, 4);
      const __m256i odd = _mm256_shuffle_epi8(table, _mm256_and_si256(upper, half));
      parts[h] = _mm256_add_epi32(dot_bytes(even, x.codes + 32 * h),
                                  dot_bytes(odd, x.codes + LINE_BYTES + 32 * h));
    }
    return join(parts[0], parts[1]);
  }
#else
  [[gnu::always_inline]] sums_int sums(const Rounded& x) const {
    sums_int total{};
    for (int64_t i = 0; i < LINE_BYTES; i++)
      total[i / 4] += TWICE_E2M1[codes[i] & 15] * x.codes[i] +
                      TWICE_E2M1[codes[i] >> 4] * x.codes[LINE_BYTES + i];
    return total;
  }
#endif
#endif
};

template <>
struct Unpacked<Int8Rows> {
  static constexpr int64_t INPUTS = LINE_BYTES;
  using Rounded = Group<INPUTS>;
  static void place(const int8_t* block, int64_t at, int8_t* codes) {
    memcpy(codes + at, block, BLOCK);
  }
  static constexpr float FACTOR = 1.0f;
  static constexpr float scales = 1.0f;
#if defined(HAS_VNNI)
  static sums_int offsets(const Rounded& x) {
    return -128 * dot_bytes(sums_int{}, _mm512_set1_epi8(1), x.codes);
  }
  __m512i codes;
  [[gnu::always_inline]] Unpacked(Int8Rows w, int64_t at, int64_t n) {
    const __m512i own = n == INPUTS ? _mm512_loadu_si512(w.codes + at)
                                    : _mm512_maskz_loadu_epi8((1ull << n) - 1, w.codes + at);
    codes = _mm512_xor_si512(own, _mm512_set1_epi8(-128));
  }
  [[gnu::always_inline]] sums_int sums(const Rounded& x) const {
    return dot_bytes(x.offsets, codes, x.codes);
  }
#else
  static sums_int offsets(const Rounded&) { return sums_int{}; }
  const int8_t* codes;
  int8_t last_codes[LINE_BYTES];
  [[gnu::always_inline]] Unpacked(Int8Rows w, int64_t at, int64_t n) : codes(w.codes + at) {
    if (n < INPUTS) codes = part_of(codes, n, last_codes);
  }
#if defined(__AVX2__)
  [[gnu::always_inline]] sums_int sums(const Rounded& x) const {
    const __m256i* own = (const __m256i*)codes;
    return join(dot_bytes(_mm256_loadu_si256(own), x.codes),
                dot_bytes(_mm256_loadu_si256(own + 1), x.codes + 32));
  }
#else
  [[gnu::always_inline]] sums_int sums(const Rounded& x) const {
    sums_int total{};
    for (int64_t i = 0; i < LINE_BYTES; i++) total[i / 4] += codes[i] * x.codes[i];
    return total;
  }
#endif
#endif
};

// Round rows of activations into groups.
template <class U>
static void round_rows(int64_t rows, const float* x, int64_t ldx, int64_t depth,
                       typename U::Rounded* to) {
  constexpr int64_t EACH = U::INPUTS / SUMS;  // inputs of a sum
  for (int64_t m = 0; m < rows; m++, x += ldx)
    for (int64_t t = 0; t < depth; t += U::INPUTS, to++) {
      for (int64_t b = 0; b < U::INPUTS; b += BLOCK) {
        const int64_t rest = depth - t - b, n = rest < 0 ? 0 : rest < BLOCK ? rest : BLOCK;
        int8_t codes[BLOCK];
        const float scale = round_block(n ? x + t + b : x, n, codes);
        U::place(codes, b, to->codes);
        for (int64_t s = 0; s < BLOCK / EACH; s++) to->scales[b / EACH + s] = scale;
      }
      to->offsets = U::offsets(*to);
    }
}

INLINE vec folded(sums_float v) {
  vec total;
  memcpy(&total, &v, sizeof total);
  for (size_t at = sizeof total; at < sizeof v; at += sizeof total) {
    vec part;
    memcpy(&part, (const char*)&v + at, sizeof part);
    total += part;
  }
  return total;
}

// `outputs` for M rows, so few that their sums fit in one vector.
template <int M, class W>
static void integer_rows(const typename Unpacked<W>::Rounded* x, int64_t groups, W w,
                         int64_t outputs, int64_t depth, float* y, int64_t ldy) {
  using U = Unpacked<W>;
  vec total[LANES]{};
  for (int64_t r = 0; r < outputs; r++) {
    const W row = from_row(w, r, depth);
    sums_float each[M]{};
    const auto add = [&](int64_t g, int64_t n) __attribute__((always_inline)) {
      prefetch(elements(row) + g * U::INPUTS, AHEAD);
      const U group(row, g * U::INPUTS, n);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        const auto& part = x[m * groups + g];
        each[m] += __builtin_convertvector(group.sums(part), sums_float) *
                   (part.scales * group.scales);
      }
    };
    const int64_t whole = depth / U::INPUTS;
    for (int64_t g = 0; g < whole; g++) add(g, U::INPUTS);
    if (whole < groups) add(whole, depth - whole * U::INPUTS);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) total[r * M + m] = folded(each[m]);
  }
  const vec result = sums(total);
  for (int m = 0; m < M; m++)
    for (int64_t r = 0; r < outputs; r++)
      y[m * ldy + r] = scaled(w, r, U::FACTOR * result[r * M + m]);
}

template <class W>
static void integer_rows(int64_t rows, const typename Unpacked<W>::Rounded* x, int64_t groups, W w,
                         int64_t outputs, int64_t depth, float* y, int64_t ldy) {
  switch (rows) {
    case 1: return integer_rows<1>(x, groups, w, outputs, depth, y, ldy);
    case 2: return integer_rows<2>(x, groups, w, outputs, depth, y, ldy);
    case 3: return integer_rows<3>(x, groups, w, outputs, depth, y, ldy);
    default: return integer_rows<4>(x, groups, w, outputs, depth, y, ldy);
  }
}
}  // namespace detail

// y [rows, first..last) for any number of rows, as `few_rows` of rows.h.
template <class W>
static inline void few_rows(int64_t rows, const float* x, int64_t ldx, Int8Activations<W> w,
                            int64_t first, int64_t last, int64_t depth, float* y, int64_t ldy) {
  using U = detail::Unpacked<W>;
  using Rounded = typename U::Rounded;
  const int64_t groups = (depth + U::INPUTS - 1) / U::INPUTS;
  const int64_t fit = detail::ROUNDED / (groups * sizeof(Rounded));
  const int64_t block = rows < fit ? rows : fit < detail::MOST ? detail::MOST : fit;
  const int64_t line = depth * detail::LINE_BYTES / U::INPUTS;  // bytes of a row of W
  const int64_t panel = line > detail::PANEL / LANES ? LANES : detail::PANEL / line / LANES * LANES;
  Scratch scratch(block * groups * sizeof(Rounded) / sizeof(float));
  Rounded* rounded = (Rounded*)scratch.take(0, 0);
  for (int64_t row = 0; row < rows; row += block) {
    const int64_t height = rows - row < block ? rows - row : block;
    detail::round_rows<U>(height, x + row * ldx, ldx, depth, rounded);
    for (int64_t begin = first; begin < last; begin += panel) {
      const int64_t end = last - begin < panel ? last : begin + panel;
      for (int64_t m = 0; m < height; m += detail::MOST) {
        const int64_t some = height - m < detail::MOST ? height - m : detail::MOST;
        const int64_t step = LANES / some;
        for (int64_t n = begin; n < end; n += step)
          detail::integer_rows<W>(some, rounded + m * groups, groups, from_row((W)w, n, depth),
                                  end - n < step ? end - n : step, depth,
                                  y + (row + m) * ldy + n, ldy);
      }
    }
  }
}

// As `gemm_turned` of gemm.h, for rows of x and of W without gaps.
template <class W>
static inline void gemm_turned(int64_t rows, int64_t columns, int64_t depth, const float* a,
                               int64_t a_row, int64_t, Int8Activations<W> b, int64_t, float* c,
                               int64_t ldc, bool = false, Int8Activations<W> = {}) {
  few_rows(rows, a, a_row, b, 0, columns, depth, c, ldc);
}
