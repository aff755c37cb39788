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

// The dot products of `query` with `n` consecutive keys, LANES or fewer; other lanes repeat the first.
template <class X, class K>
INLINE vec scores_of(const X* query, const K* keys, int64_t n, int64_t stride,
                     int64_t head_dim) {
  const K* rows[LANES];
#pragma GCC unroll 16
  for (int r = 0; r < LANES; r++) rows[r] = keys + (r < n ? r : 0) * stride;
  vec total[LANES]{};
  int64_t d = 0;
  for (; d + LANES <= head_dim; d += LANES) {
    const vec q = load(query + d);
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++) total[r] += q * load(rows[r] + d);
  }
  if (d < head_dim) {
    const vec q = load_part(query + d, head_dim - d);
    for (int r = 0; r < LANES; r++) total[r] += q * load_part(rows[r] + d, head_dim - d);
  }
  return sum_of_each(total);
}

// scores = the numerators of softmax(query keys^T scale), up to a whole vector; returns the
// denominator.
template <class X, class K>
float weigh(const Pages<K>& p, const X* query, int64_t count, int64_t head_dim, float scale,
            float* scores) {
  vec most = splat(-INFINITY);
  for (int64_t start = 0; start < count; start += p.page_size) {
    const int64_t n = smaller(p.page_size, count - start);
    const K* keys = p.key(start);
    for (int64_t j = 0; j < n; j += LANES) {
      const int64_t some = smaller(LANES, n - j);
      const vec found = scores_of(query, keys + j * p.stride, some, p.stride, head_dim) * scale;
      most = max(found, most);
      store(scores + start + j, found);  // beyond the page's end the next page's follow
    }
  }
  const int64_t whole = (count + LANES - 1) / LANES * LANES;
  for (int64_t j = count; j < whole; j++) scores[j] = -INFINITY;
  const vec largest_score = splat(largest(most));
  vec total{};
  for (int64_t j = 0; j < whole; j += LANES) {
    const vec numerators = exp(load(scores + j) - largest_score);
    store(scores + j, numerators);
    total += numerators;
  }
  return sum(total);
}

// y = sum of the values weighted by `scores`, for `width` columns, LANES or fewer.
template <bool WHOLE, class X, class K>
INLINE void gather(const Pages<K>& p, const float* scores, int64_t count, int64_t d, int64_t width,
                   float share, X* y) {
  vec out[4]{};
  for (int64_t start = 0; start < count; start += p.page_size) {
    const int64_t n = smaller(p.page_size, count - start);
    const K* values = p.value(start) + d;
    const float* s = scores + start;
    const auto value = [&](int64_t j) {
      return WHOLE ? load(values + j * p.stride) : load_part(values + j * p.stride, width);
    };
    int64_t j = 0;
    for (; j + 4 <= n; j += 4)
      for (int r = 0; r < 4; r++) out[r] += s[j + r] * value(j + r);
    for (; j < n; j++) out[0] += s[j] * value(j);
  }
  const vec result = ((out[0] + out[1]) + (out[2] + out[3])) * share;
  if (WHOLE) store(y + d, result);
  else store_part(y + d, result, width);
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
        const float share = 1.0f / sum;
        X* out = y + (token * heads + g) * head_dim;
        int64_t d = 0;
        for (; d + LANES <= head_dim; d += LANES)
          gather<true>(p, scores.data(), count, d, LANES, share, out);
        if (d < head_dim) gather<false>(p, scores.data(), count, d, head_dim - d, share, out);
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
