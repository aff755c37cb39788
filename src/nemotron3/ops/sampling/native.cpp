// Sampling: for each row the token with the largest sum of logit and noise (see noise.py), and the
// log-probability of one.
//
// Exact noise takes two float64 logarithms, so it is computed only for the few tokens that can win.
// The noise of u = (bits + 1/2) / 2^52 is at most -log u, so a token loses against the best one so
// far if u > e^(logit - best): one float32 exponential and a hash, both vectorised.
#include <cmath>

#include "simd.h"
#include "team.h"

namespace {
constexpr int64_t MIN_PARALLEL_WORK = 1 << 15;  // elements below which a second thread costs more
constexpr float ROUNDING = 1.0001f;         // bounds the float32 error of the comparison
constexpr uint64_t STEP = 0x9E3779B97F4A7C15u;

typedef uint64_t words __attribute__((vector_size(8 * LANES)));

template <class Word>
INLINE Word random_bits(Word word) {  // 52 of them
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
  return (word ^ (word >> 31)) >> 12;
}

double score(float logit, uint64_t key, int64_t token) {
  const uint64_t bits = random_bits(key + (uint64_t)(token + 1) * STEP);
  const double uniform = ((double)bits + 0.5) * 0x1p-52;
  return (double)logit - std::log(-std::log1p(-uniform));
}

struct Best {
  double score;
  int64_t token;
  void take(float logit, uint64_t key, int64_t candidate) {
    if (!(logit > -INFINITY)) return;
    const double other = ::score(logit, key, candidate);
    if (other > score || (other == score && candidate < token)) *this = {other, candidate};
  }
};

int64_t draw(const float* logits, int64_t vocab, uint64_t key) {
  int64_t top = 0;
  for (int64_t i = 0; i < vocab; i++) {
    if (logits[i] != logits[i]) return -1;
    if (logits[i] > logits[top]) top = i;
  }
  if (logits[top] == -INFINITY) return -1;
  Best best{score(logits[top], key, top), top};
  words hashed;
  for (int i = 0; i < LANES; i++) hashed[i] = key + (uint64_t)(i + 1) * STEP;
  int64_t i = 0;
  for (; i + LANES <= vocab; i += LANES, hashed += LANES * STEP) {
    const vec uniform = __builtin_convertvector(random_bits(hashed), vec) * 0x1p-52f;
    const vec reach = exp(load(logits + i) - (float)best.score) * ROUNDING;
    if (largest(reach - uniform) < 0.0f) continue;
    for (int64_t j = i; j < i + LANES; j++) best.take(logits[j], key, j);
  }
  for (; i < vocab; i++) best.take(logits[i], key, i);
  return best.token;
}

// The log-probability of a token, and how many are at least as probable. Blocks of exponentials are
// added in float64, since a float32 sum over a large vocabulary would be off in the last digits.
float logprob(const float* logits, int64_t vocab, int64_t token, int64_t* rank) {
  constexpr int64_t BLOCK = 1024;
  vec most = splat(-INFINITY);
  int64_t at_least = 0, i = 0;
  ivec counts{};
  for (; i + LANES <= vocab; i += LANES) {
    const vec x = load(logits + i);
    most = max(x, most);
    counts -= x >= logits[token];
  }
  for (int lane = 0; lane < LANES; lane++) at_least += counts[lane];
  float top = largest(most);
  for (; i < vocab; i++) {
    top = logits[i] > top ? logits[i] : top;
    at_least += logits[i] >= logits[token];
  }
  *rank = at_least;
  double total = 0;
  for (int64_t block = 0; block < vocab; block += BLOCK) {
    const int64_t end = block + BLOCK < vocab ? block + BLOCK : vocab;
    vec part{};
    for (i = block; i + LANES <= end; i += LANES) part += exp(load(logits + i) - top);
    total += sum(part);
    for (; i < end; i++) total += std::exp(logits[i] - top);
  }
  return (float)(logits[token] - top - std::log(total));
}
}  // namespace

extern "C" {

// The same of tokens [rows], with their ranks.
void logprobs_and_ranks(const float* logits, const int64_t* tokens, float* logprobs, int64_t* ranks,
                        int64_t rows, int64_t vocab, int64_t ld, int64_t threads) {
  parallel_region(rows > 1 && rows * vocab > MIN_PARALLEL_WORK ? threads : 1, [&](Team& team) {
    const Range part = team.share(rows);
    for (int64_t r = part.first; r < part.last; r++)
      logprobs[r] = logprob(logits + r * ld, vocab, tokens[r], ranks + r);
  });
}

// tokens [rows] of logits [rows, vocab], whose rows are `ld` apart, and keys [rows].
void gumbel_argmax(const float* logits, const int64_t* keys, int64_t* tokens, int64_t rows,
                   int64_t vocab, int64_t ld, int64_t threads) {
  parallel_region(rows > 1 && rows * vocab > MIN_PARALLEL_WORK ? threads : 1, [&](Team& team) {
    const Range part = team.share(rows);
    for (int64_t r = part.first; r < part.last; r++)
      tokens[r] = draw(logits + r * ld, vocab, (uint64_t)keys[r]);
  });
}
}
