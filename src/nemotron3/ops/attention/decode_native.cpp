// Attention of a few new tokens of each sequence over the pages that hold its keys and values.
//
// The time goes into reading keys and values. A thread handles the heads that share one key head,
// page by page, and keeps only the scores of those heads for one token.
#include <cmath>
#include <vector>

#include "bfloat16.h"
#include "team.h"

namespace {
// Queries, new keys and values, and results are of type X; cached keys and values of type K.
template <class K>
struct Pages {
  const K *keys, *values;      // of one key head
  const int64_t* pages;        // of one sequence
  int64_t page_size, stride;   // tokens of a page, elements between tokens
  const K* key(int64_t token) const { return keys + at(token); }
  const K* value(int64_t token) const { return values + at(token); }
  int64_t at(int64_t token) const {
    return (pages[token / page_size] * page_size + token % page_size) * stride;
  }
};

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The dot products of `query` with LANES consecutive keys.
template <class X, class K>
INLINE vec scores_of(const X* query, const K* keys, int64_t stride, int64_t head_dim) {
  vec total[LANES]{};
  int64_t d = 0;
  for (; d + LANES <= head_dim; d += LANES) {
    const vec q = load(query + d);
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++) total[r] += q * load(keys + r * stride + d);
  }
  if (d < head_dim) {
    const vec q = load_part(query + d, head_dim - d);
    for (int r = 0; r < LANES; r++) total[r] += q * load_part(keys + r * stride + d, head_dim - d);
  }
  transpose(total);
  for (int r = 1; r < LANES; r++) total[0] += total[r];
  return total[0];
}

template <class X, class K>
INLINE float score_of(const X* query, const K* key, int64_t head_dim) {
  vec total{};
  for (int64_t d = 0; d < head_dim; d += LANES) {
    const int64_t n = smaller(LANES, head_dim - d);
    total += load_part(query + d, n) * load_part(key + d, n);
  }
  return sum(total);
}

// scores = the numerators of softmax(query keys^T scale); returns the denominator.
template <class X, class K>
float weigh(const Pages<K>& p, const X* query, int64_t count, int64_t head_dim, float scale,
            float* scores) {
  float most = -INFINITY;
  for (int64_t start = 0; start < count; start += p.page_size) {
    const int64_t n = smaller(p.page_size, count - start);
    const K* keys = p.key(start);
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES)
      store(scores + start + j, scores_of(query, keys + j * p.stride, p.stride, head_dim) * scale);
    for (; j < n; j++)
      scores[start + j] = score_of(query, keys + j * p.stride, head_dim) * scale;
  }
  for (int64_t j = 0; j < count; j++) most = scores[j] > most ? scores[j] : most;
  vec total{};
  for (int64_t j = 0; j < count; j += LANES) {
    const int64_t n = smaller(LANES, count - j);
    store_part(scores + j, exp(load_part(scores + j, n) - most), n);
    total += load_part(scores + j, n);
  }
  return sum(total);
}

// y = sum of the values weighted by `scores`, for LANES columns at a time.
template <class X, class K>
void gather(const Pages<K>& p, const float* scores, int64_t count, int64_t head_dim, float share,
            X* y) {
  for (int64_t d = 0; d < head_dim; d += LANES) {
    const int64_t width = smaller(LANES, head_dim - d);
    vec out[4]{};
    for (int64_t start = 0; start < count; start += p.page_size) {
      const int64_t n = smaller(p.page_size, count - start);
      const K* values = p.value(start) + d;
      const float* s = scores + start;
      int64_t j = 0;
      if (width == LANES)
        for (; j + 4 <= n; j += 4)
          for (int r = 0; r < 4; r++) out[r] += s[j + r] * load(values + (j + r) * p.stride);
      for (; j < n; j++) out[0] += s[j] * load_part(values + j * p.stride, width);
    }
    store_part(y + d, ((out[0] + out[1]) + (out[2] + out[3])) * share, width);
  }
}

// Append k, v [rows * steps, kv_heads, head_dim] to the pages, and y = attention of q [rows *
// steps, heads, head_dim]. `keys`, `values` [pages, page_size, kv_heads, head_dim]; sequence r has
// cached_lengths[r] tokens in the pages table[slots[r]], a row of `width` page numbers. ldq, ldk
// and ldv are the distances between the rows of q, k and v, in elements.
template <class X, class K>
void steps(Team& team, const X* q, const X* k, const X* v, K* keys, K* values,
           const int64_t* table, const int64_t* slots, const int64_t* cached_lengths, X* y,
           int64_t rows, int64_t steps, int64_t heads, int64_t kv_heads, int64_t head_dim,
           int64_t page_size, int64_t width, int64_t ldq, int64_t ldk, int64_t ldv) {
  const int64_t group = heads / kv_heads, stride = kv_heads * head_dim;
  const float scale = 1.0f / std::sqrt((float)head_dim);
  std::vector<float> scores;
  for (int64_t task; (task = team.next()) < rows * kv_heads;) {
    const int64_t r = task / kv_heads, h = task % kv_heads;
    K *ours = keys + h * head_dim, *our_values = values + h * head_dim;
    const Pages<K> p{ours, our_values, table + slots[r] * width, page_size, stride};
    scores.resize(cached_lengths[r] + steps + LANES);
    for (int64_t t = 0; t < steps; t++) {
      const int64_t count = cached_lengths[r] + t + 1, token = r * steps + t, at = p.at(count - 1);
      copy_numbers(k + token * ldk + h * head_dim, head_dim, ours + at);
      copy_numbers(v + token * ldv + h * head_dim, head_dim, our_values + at);
      for (int64_t g = h * group; g < (h + 1) * group; g++) {
        const X* query = q + token * ldq + g * head_dim;
        const float sum = weigh(p, query, count, head_dim, scale, scores.data());
        X* out = y + (token * heads + g) * head_dim;
        gather(p, scores.data(), count, head_dim, 1.0f / sum, out);
      }
    }
  }
}
}  // namespace

#define STEPS(X, K) PARALLEL_KERNEL(attention_steps_##X##_##K, (steps<X, K>))
typedef float float32;
STEPS(float32, float32)
STEPS(float32, bfloat16)
STEPS(bfloat16, float32)
STEPS(bfloat16, bfloat16)
