// Block scales for a range of 4 or of 6, as defined by ops/nvfp4/four_over_six.py. LANES blocks are
// transposed, so that each is a lane: the errors of a block are summed one after another.
#pragma once
#include "nvfp4.h"

#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC push_options
#pragma GCC optimize("-ffp-contract=off")
#endif
namespace nvfp4 {
constexpr float MOST_OF_FOUR_OVER_SIX = 6.0f * 256.0f;

// One of the two scales of LANES blocks, and the squared errors with it.
struct Candidate {
  ivec codes;
  vec scales, factors, errors{};
  Candidate(vec wanted, const Global& g) {
    const Rounded r = nearest(min(wanted, splat(448.0f)), E4M3);
    codes = r.codes, scales = r.values;
    factors = min(1.0f / (scales * g.decode), splat(FLT_MAX));
  }
  Rounded rounded(vec x) const { return element<false>(x * factors, nullptr); }
  void add_error(vec x, float amax) {
    const vec error = rounded(x).values * scales * amax / MOST_OF_FOUR_OVER_SIX - x;
    errors += error * error;
  }
};

// `blocks` holds LANES blocks and is overwritten with values, or with codes as integers. Returns
// the codes of the scales.
INLINE ivec four_or_six(float* blocks, float amax, const Global& g, bool values) {
  float turned[BLOCK * LANES];
  transpose(blocks, BLOCK, LANES, BLOCK, turned, LANES);
  ivec most{};
  for (int64_t e = 0; e < BLOCK; e++) most = max(most, magnitude(load(turned + e * LANES)));
  const ivec bad = most >= INFINITE;
  const vec base = (vec)(bad ? ivec{} : most) / 6.0f * g.encode;
  Candidate best(base, g), four(base * 1.5f, g);
  for (int64_t e = 0; e < BLOCK; e++) {
    const vec x = load(turned + e * LANES);
    best.add_error(x, amax), four.add_error(x, amax);
  }
  const ivec is_four = four.errors < best.errors;
  best.codes = is_four ? four.codes : best.codes;
  best.scales = is_four ? four.scales : best.scales;
  best.factors = is_four ? four.factors : best.factors;
  const vec units = bad ? splat(NAN) : best.scales * g.scale;
  for (int64_t e = 0; e < BLOCK; e++) {
    const Rounded r = best.rounded(load(turned + e * LANES));
    store(turned + e * LANES, values ? r.values * units : (vec)(bad ? ivec{} : r.codes));
  }
  transpose(turned, LANES, BLOCK, LANES, blocks, BLOCK);
  return bad ? ivec{} + 0x7F : best.codes;
}

// Blocks along rows, to nearest; the arguments are those of `along_rows`.
static void four_over_six(Team& team, const float* x, const float* amax, const Output& out,
                          int64_t rows, int64_t of_one, int64_t d, int64_t ld) {
  const Range part = team.share(rows);
  const int64_t in_row = d / BLOCK;
  for (int64_t row = part.first; row < part.last;) {
    const int64_t tensor = row / of_one, end = (tensor + 1) * of_one;
    const int64_t until = end < part.last ? end : part.last;
    const Global g(amax[tensor], MOST_OF_FOUR_OVER_SIX);
    for (int64_t b = row * in_row; b < until * in_row; b += LANES) {
      const int64_t left = until * in_row - b, n = left < LANES ? left : LANES;
      float blocks[LANES * BLOCK]{};
      const auto at = [&](int64_t i) { return (b + i) / in_row * ld + (b + i) % in_row * BLOCK; };
      for (int64_t i = 0; i < n; i++) memcpy(blocks + i * BLOCK, x + at(i), 4 * BLOCK);
      const ivec codes = four_or_six(blocks, amax[tensor], g, out.values);
      for (int64_t i = 0; i < n; i++) {
        if (out.scales) out.scales[b + i] = (uint8_t)codes[i];
        if (out.values) {
          memcpy(out.values + at(i), blocks + i * BLOCK, 4 * BLOCK);
          continue;
        }
        for (int64_t p = 0; p < PARTS; p++) {
          const float* from = blocks + i * BLOCK + p * LANES;
          pack(bits(load(from)), out.codes + (at(i) + p * LANES) / 2);
        }
      }
    }
    row = until;
  }
}
}  // namespace nvfp4
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC pop_options
#endif
