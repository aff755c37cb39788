// Block scales that are chosen by the error of what is rounded: one of those for a range of 4 or of
// 6 (ops/nvfp4/four_over_six.py), or the best of all neighbours (ops/nvfp4/mse.py). LANES blocks are
// transposed, so that each is a lane: the errors of a block are summed one after another.
#pragma once
#include "nvfp4.h"

EXACT_BEGIN
namespace nvfp4 {
// A scale of LANES blocks each, and the squared errors with it.
struct Candidate {
  ivec codes;
  vec scales, factors, errors{};
  Candidate(Rounded scale, const Global& g) : codes(scale.codes), scales(scale.values) {
    factors = min(1.0f / (scales * g.decode), splat(FLT_MAX));
  }
  Rounded rounded(vec x) const { return element<false>(x * factors, nullptr); }
  void take_better(const Candidate& other) {
    const ivec better = other.errors < errors;
    codes = better ? other.codes : codes, scales = better ? other.scales : scales;
    factors = better ? other.factors : factors, errors = better ? other.errors : errors;
  }
};

struct FourOrSix {
  static constexpr float MOST = 6.0f * 256.0f;
  // `turned` holds element e of block i at e * LANES + i; `most` are the blocks' largest magnitudes.
  INLINE Candidate best(const float* turned, vec most, float amax, const Global& g) {
    const vec base = most / 6.0f * g.encode;
    Candidate six = of(base, turned, amax, g);
    six.take_better(of(base * 1.5f, turned, amax, g));
    return six;
  }
  INLINE Candidate of(vec wanted, const float* turned, float amax, const Global& g) {
    Candidate found(nearest(min(wanted, splat(448.0f)), E4M3), g);
    for (int64_t e = 0; e < BLOCK; e++) {
      const vec x = load(turned + e * LANES);
      const vec error = found.rounded(x).values * found.scales * amax / MOST - x;
      found.errors += error * error;
    }
    return found;
  }
};

struct LeastError {
  static constexpr float MOST = 6.0f * 448.0f;
  static constexpr int BELOW = 8, ABOVE = 6, LARGEST_CODE = 0x7E;
  INLINE Candidate best(const float* turned, vec most, float, const Global& g) {
    const ivec plain = nearest(min(most * g.sixth, splat(448.0f)), E4M3).codes;
    Candidate found = of(plain, turned, g);
    for (int step = -BELOW; step <= ABOVE; step++) {
      const ivec tried = plain + step, low = tried > 0 ? tried : ivec{};
      if (step) found.take_better(of(low < LARGEST_CODE ? low : ivec{} + LARGEST_CODE, turned, g));
    }
    return found;
  }
  INLINE Candidate of(ivec codes, const float* turned, const Global& g) {
    // The exponent's bias is 7 in E4M3 and 127 in float32; codes below 8 are subnormal numbers.
    const ivec normal = ((codes >> 3) + 120) << 23 | (codes & 7) << 20;
    const vec small = __builtin_convertvector(codes, vec) * 0x1p-9f;
    Candidate found({codes, codes < 8 ? small : (vec)normal}, g);
    for (int64_t e = 0; e < BLOCK; e++) {
      const vec x = load(turned + e * LANES);
      const vec error = found.rounded(x).values * found.scales - x * g.encode;
      found.errors += error * error;
    }
    return found;
  }
};

// `blocks` holds LANES blocks and is overwritten with values, or with codes as integers. Returns
// the codes of the scales.
template <class Rule>
INLINE ivec round_blocks(float* blocks, float amax, const Global& g, bool values) {
  float turned[BLOCK * LANES];
  transpose(blocks, BLOCK, LANES, BLOCK, turned, LANES);
  ivec most{};
  for (int64_t e = 0; e < BLOCK; e++) most = max(most, magnitude(load(turned + e * LANES)));
  const ivec bad = most >= INFINITE;
  const Candidate best = Rule::best(turned, (vec)(bad ? ivec{} : most), amax, g);
  const vec units = bad ? splat(NAN) : best.scales * g.scale;
  for (int64_t e = 0; e < BLOCK; e++) {
    const Rounded r = best.rounded(load(turned + e * LANES));
    store(turned + e * LANES, values ? r.values * units : (vec)(bad ? ivec{} : r.codes));
  }
  transpose(turned, LANES, BLOCK, LANES, blocks, BLOCK);
  return bad ? ivec{} + 0x7F : best.codes;
}

// Blocks along rows, to nearest; the arguments are those of `along_rows`.
template <class Rule>
static void by_error(Team& team, const float* x, const float* amax, const Output& out, int64_t rows,
                     int64_t of_one, int64_t d, int64_t ld) {
  const Range part = team.share(rows);
  const int64_t in_row = d / BLOCK;
  for (int64_t row = part.first; row < part.last;) {
    const int64_t tensor = row / of_one, end = (tensor + 1) * of_one;
    const int64_t until = end < part.last ? end : part.last;
    const Global g(amax[tensor], Rule::MOST);
    for (int64_t b = row * in_row; b < until * in_row; b += LANES) {
      const int64_t left = until * in_row - b, n = left < LANES ? left : LANES;
      float blocks[LANES * BLOCK]{};
      const auto at = [&](int64_t i) { return (b + i) / in_row * ld + (b + i) % in_row * BLOCK; };
      for (int64_t i = 0; i < n; i++) memcpy(blocks + i * BLOCK, x + at(i), 4 * BLOCK);
      const ivec codes = round_blocks<Rule>(blocks, amax[tensor], g, out.values);
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
EXACT_END
