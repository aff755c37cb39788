// Choosing experts, a token at a time: scores, the largest of scores plus bias, and their weights.
//
// The largest are found one by one, each in a pass over the scores; there are a few dozen at most.
// Of equal scores the first wins. A NaN counts as the largest, as in PyTorch, so that it reaches
// the output.
#include <cmath>
#include <memory>

#include "simd.h"
#include "team.h"

namespace {
constexpr int64_t MIN_PARALLEL_WORK = 1 << 13;  // scores below which a second thread costs more

INLINE vec read(const float* p, int64_t n, float beyond) {
  if (n >= LANES) return load(p);
  vec v = splat(beyond);
  memcpy(&v, p, 4 * n);
  return v;
}
INLINE void write(float* p, vec v, int64_t n) { n >= LANES ? store(p, v) : store_part(p, v, n); }

void score(const float* logits, float* scores, int64_t n, bool softmax) {
  vec most = splat(-INFINITY), total{};
  if (softmax)
    for (int64_t i = 0; i < n; i += LANES) most = max(most, read(logits + i, n - i, -INFINITY));
  const float top = softmax ? largest(most) : 0.0f;
  for (int64_t i = 0; i < n; i += LANES) {
    const vec x = read(logits + i, n - i, -INFINITY);
    const vec s = softmax ? exp(x - top) : sigmoid(x);
    write(scores + i, s, n - i);
    if (softmax) total += read(scores + i, n - i, 0.0f);
  }
  if (softmax) {
    const float sum_of_all = sum(total);
    for (int64_t i = 0; i < n; i++) scores[i] /= sum_of_all;
  }
}

int64_t take_largest(float* values, int64_t n) {
  vec most = splat(-INFINITY);
  for (int64_t i = 0; i < n; i += LANES) most = max(most, load(values + i));
  const float top = largest(most);
  int64_t i = 0;
  while (i + 1 < n && values[i] != top) i++;
  values[i] = -INFINITY;
  return i;
}

// indices, weights [tokens, choices] and scores [tokens, experts]; logits have rows of ldlogits.
// Given indices are read; otherwise they are written.
void route(Team& team, const float* logits, const float* bias, int64_t* indices, float* weights,
           float* scores, int64_t tokens, int64_t experts, int64_t choices, int64_t ldlogits,
           int64_t given, int64_t softmax, int64_t normalise, float scale) {
  const int64_t padded = (experts + LANES - 1) / LANES * LANES;
  const std::unique_ptr<float[]> left(new float[padded]);
  const Range part = team.share(tokens);
  for (int64_t t = part.first; t < part.last; t++) {
    float *s = scores + t * experts, *w = weights + t * choices, total = 1e-20f;
    score(logits + t * ldlogits, s, experts, softmax);
    for (int64_t i = 0; i < padded && !given; i++) {
      const float value = i < experts ? s[i] + bias[i] : -INFINITY;
      left[i] = value != value ? INFINITY : value;
    }
    for (int64_t i = 0; i < choices; i++) {
      int64_t& chosen = indices[t * choices + i];
      if (!given) chosen = take_largest(left.get(), experts);
      w[i] = s[chosen];
      total += w[i];
    }
    for (int64_t i = 0; i < choices; i++) w[i] = (normalise ? w[i] / total : w[i]) * scale;
  }
}

// Replace ds = dL/d(scores) by dL/d(logits).
void score_backward(const float* scores, float* ds, int64_t n, bool softmax) {
  float mean = 0.0f;
  if (softmax)
    for (int64_t i = 0; i < n; i++) mean += scores[i] * ds[i];
  for (int64_t i = 0; i < n; i++)
    ds[i] = softmax ? scores[i] * (ds[i] - mean) : scores[i] * (1.0f - scores[i]) * ds[i];
}
}  // namespace

PARALLEL_KERNEL(route, route)

extern "C" {

// d_logits [tokens, experts] from the results of `route` and the gradients of weights and scores;
// on entry d_logits holds the gradient of the scores.
void route_backward(const int64_t* indices, const float* scores, const float* d_weights,
                    float* d_logits, int64_t tokens, int64_t experts, int64_t choices,
                    int64_t softmax, int64_t normalise, float scale, int64_t threads) {
  parallel_region(tokens * experts > MIN_PARALLEL_WORK ? threads : 1, [&](Team& team) {
    const Range part = team.share(tokens);
    for (int64_t t = part.first; t < part.last; t++) {
      const int64_t* chosen = indices + t * choices;
      const float *s = scores + t * experts, *dw = d_weights + t * choices;
      float *ds = d_logits + t * experts, total = 1.0f, mean = 0.0f;
      if (normalise) {  // w_i = scale s_i / total: each score affects all weights
        total = 1e-20f;
        for (int64_t i = 0; i < choices; i++) total += s[chosen[i]];
        for (int64_t i = 0; i < choices; i++) mean += dw[i] * s[chosen[i]] / total;
      }
      for (int64_t i = 0; i < choices; i++) ds[chosen[i]] += scale / total * (dw[i] - mean);
      score_backward(s, ds, experts, softmax);
    }
  });
}
}
