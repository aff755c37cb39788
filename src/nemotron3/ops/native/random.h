// Random bits as defined by ops/rounding/bits.py: 128 elements take 16 counters of Philox4x32,
// whose four words are eight 16-bit numbers for each of 16 lanes.
#pragma once
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "simd.h"

constexpr int64_t RANDOM_BLOCK = 128, RANDOM_LANES = 16;
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint64_t pairs __attribute__((vector_size(4 * LANES)));

namespace detail {
INLINE pairs times(pairs a, uint32_t b) {
#if defined(__AVX512F__)
  return (pairs)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#else
  return (a & 0xFFFFFFFF) * b;
#endif
}

// The upper and lower halves of 64-bit products, computed for every second lane at a time.
INLINE void multiply(uvec a, uint32_t b, uvec& high, uvec& low) {
  constexpr uint64_t LOW = 0xFFFFFFFF;
  const pairs even = times((pairs)a, b), odd = times((pairs)a >> 32, b);
  high = (uvec)(even >> 32 | (odd & ~LOW));
  low = (uvec)((even & LOW) | odd << 32);
}
}  // namespace detail

struct Random {
  uint32_t seed, stream;
  int64_t rounds;

  // Turn LANES counters, whose first and third words are given and whose others are zero, into four
  // random words each.
  void philox(uvec& a, uvec& b, uvec& c, uvec& d) const {
    b = uvec{}, d = uvec{};
    uint32_t k = seed, l = stream;
    for (int64_t r = 0; r < rounds; r++, k += 0x9E3779B9, l += 0xBB67AE85) {
      uvec high_a, low_a, high_c, low_c;
      detail::multiply(a, 0xD2511F53, high_a, low_a);
      detail::multiply(c, 0xCD9E8D57, high_c, low_c);
      a = high_c ^ b ^ k, b = low_c, c = high_a ^ d ^ l, d = low_a;
    }
  }

  // 16 bits for each of the 128 elements of one block, at one position.
  void draw(int64_t block, uint32_t position, int32_t* to) const {
    for (int64_t lane = 0; lane < RANDOM_LANES; lane += LANES) {
      uvec a{}, b, c = uvec{} + position, d;
      for (int i = 0; i < LANES; i++) a[i] = (uint32_t)(block * RANDOM_LANES + lane + i);
      philox(a, b, c, d);
      const uvec words[4] = {a, b, c, d};
      for (int w = 0; w < 4; w++) {
        const uvec low_half = words[w] & 0xFFFF, high_half = words[w] >> 16;
        memcpy(to + (2 * w) * RANDOM_LANES + lane, &low_half, sizeof low_half);
        memcpy(to + (2 * w + 1) * RANDOM_LANES + lane, &high_half, sizeof high_half);
      }
    }
  }

  // 16 bits for one element, at each of LANES positions.
  uvec draw(int64_t element, uvec positions) const {
    const int64_t half = element % RANDOM_BLOCK / RANDOM_LANES;
    uvec a = uvec{} + (uint32_t)(element / RANDOM_BLOCK * RANDOM_LANES + element % RANDOM_LANES);
    uvec b, c = positions, d;
    philox(a, b, c, d);
    const uvec word = half < 4 ? (half < 2 ? a : b) : (half < 6 ? c : d);
    return half % 2 ? word >> 16 : word & 0xFFFF;
  }
};
