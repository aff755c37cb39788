// Causal attention of whole sequences, block by block, and its gradients: FlashAttention
// (arXiv 2205.14135, 2307.08691) for the caches of a CPU.
//
// Scores exist for one block of queries and keys at a time. In the forward pass, a task is a block
// of queries with all heads that share one key head, so that keys are transposed and values packed
// once for all of them; it keeps the running maximum and sum of its rows. In the backward pass, a
// task is a segment and a key head: it goes through the blocks of keys, recomputes their scores
// from the logarithm of each row's sum, which the forward pass has stored, and accumulates the
// gradients of the queries. Queries, keys, values and results are of type X, float or bfloat16; blocks
// of them are float32. No result depends on the number of threads or on other segments.
#include <cmath>
#include <vector>

#include "gemm.h"
#include "scratch.h"
#include "team.h"

namespace {
constexpr int64_t QUERIES = 48;  // of a block: whole tiles
constexpr int64_t KEYS = 128;    // of a block: whole vectors
constexpr int64_t SCORES = pitch(KEYS);
constexpr int64_t MIN_PARALLEL_WORK = 1 << 15;  // multiply-adds below which a second thread costs more

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
template <class X>
INLINE vec read(const X* p, int64_t n) { return n >= LANES ? load(p) : load_part(p, n); }
template <class X>
INLINE void write(X* p, vec v, int64_t n) { n >= LANES ? store(p, v) : store_part(p, v, n); }

struct Shape {
  int64_t heads, kv_heads, head_dim;
  float scale() const { return 1.0f / std::sqrt((float)head_dim); }
  int64_t group() const { return heads / kv_heads; }
};

template <class X>
struct Operands {
  const X *q, *k, *v;
  int64_t ldq, ldk, ldv;
};

// The rows of a segment's queries and keys; the queries are the last of its positions.
struct Segment {
  int64_t first_query, queries, first_key, keys;
  Segment(const int64_t* query_bounds, const int64_t* key_bounds, int64_t i)
      : first_query(query_bounds[i]), queries(query_bounds[i + 1] - query_bounds[i]),
        first_key(key_bounds[i]), keys(key_bounds[i + 1] - key_bounds[i]) {}
  // How many of the keys from `key` on the query sees.
  int64_t seen(int64_t query, int64_t key) const { return keys - queries + query + 1 - key; }
};

// to = from * factor, row by row.
template <class From, class To>
void copy_rows(const From* from, int64_t ld, int64_t rows, int64_t columns, float factor, To* to,
               int64_t ld_to) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < columns; i += LANES)
      write(to + r * ld_to + i, read(from + r * ld + i, columns - i) * factor, columns - i);
}

// to = from transposed. `narrow` is scratch for rows of bfloat16.
template <class X>
void turn_rows(const X* from, int64_t ld, int64_t rows, int64_t columns, float* to, int64_t ld_to,
               float* narrow, int64_t ld_narrow) {
  if constexpr (std::is_same_v<X, float>) {
    transpose(from, ld, rows, columns, to, ld_to);
  } else {
    copy_rows(from, ld, rows, columns, 1.0f, narrow, ld_narrow);
    transpose(narrow, ld_narrow, rows, columns, to, ld_to);
  }
}

// `value` in the first n lanes and `rest` in the others.
INLINE vec first(int64_t n, vec value, float rest) {
  ivec lane;
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) lane[i] = i;
  return lane < (int32_t)n ? value : splat(rest);
}

struct ForwardBuffers {
  int64_t ldd;
  float *q, *out, *keys, *values, *scores, *most, *total;
  static int64_t floats(const Shape& s) {
    const int64_t ldd = pitch(s.head_dim), rows = s.group() * QUERIES;
    return (2 * rows + KEYS) * ldd + (s.head_dim + QUERIES) * SCORES + 2 * rows;
  }
  ForwardBuffers(const Shape& s, Scratch& scratch) : ldd(pitch(s.head_dim)) {
    q = scratch.take(s.group() * QUERIES, ldd);
    out = scratch.take(s.group() * QUERIES, ldd);
    keys = scratch.take(s.head_dim, SCORES);
    values = scratch.take(KEYS, ldd);
    scores = scratch.take(QUERIES, SCORES);
    most = scratch.take(s.group(), QUERIES);
    total = scratch.take(s.group(), QUERIES);
  }
};

// Replace a row of scores by e^(score - most), where `most` is the row's running maximum, and by
// zero beyond the n keys that the query sees. The row's sum and output are rescaled to the new
// maximum.
INLINE void weigh(float* scores, int64_t n, int64_t columns, float& most, float& total, float* out,
                  int64_t head_dim) {
  vec highest = splat(most);
  for (int64_t j = 0; j < n; j += LANES)
    highest = max(first(n - j, load(scores + j), -INFINITY), highest);
  const float now = largest(highest);
  vec sums{};
  for (int64_t j = 0; j < columns; j += LANES) {
    const vec e = first(n - j, exp(load(scores + j) - now), 0.0f);
    store(scores + j, e);
    sums += e;
  }
  if (now > most) {
    const float factor = exp(splat(most - now))[0];
    total *= factor;
    for (int64_t i = 0; i < head_dim; i += LANES) store(out + i, load(out + i) * factor);
    most = now;
  }
  total += sum(sums);
}

// Forward pass of a block of queries in the heads that share a key head. The logarithm of each
// row's sum is written to `sums` [heads, queries of all segments].
template <class X>
void attend(const Shape& s, const Operands<X>& o, const Segment& segment, int64_t query,
            int64_t kv_head, const ForwardBuffers& buf, X* y, float* sums, int64_t ldsums) {
  const int64_t D = s.head_dim, group = s.group(), n = smaller(QUERIES, segment.queries - query);
  const int64_t row = segment.first_query + query, head = kv_head * group;
  for (int64_t h = 0; h < group; h++)
    copy_rows(o.q + row * o.ldq + (head + h) * D, o.ldq, n, D, s.scale(),
              buf.q + h * QUERIES * buf.ldd, buf.ldd);
  memset(buf.out, 0, 4 * group * QUERIES * buf.ldd);
  for (int64_t i = 0; i < group * QUERIES; i++) buf.most[i] = -INFINITY, buf.total[i] = 0;
  const int64_t end = segment.seen(query + n - 1, 0);
  for (int64_t key = 0; key < end; key += KEYS) {
    const int64_t columns = smaller(KEYS, end - key), at = segment.first_key + key;
    turn_rows(o.k + at * o.ldk + kv_head * D, o.ldk, columns, D, buf.keys, SCORES, buf.values,
              buf.ldd);
    copy_rows(o.v + at * o.ldv + kv_head * D, o.ldv, columns, D, 1.0f, buf.values, buf.ldd);
    for (int64_t h = 0; h < group; h++) {
      const int64_t first_row = h * QUERIES;
      float* out = buf.out + first_row * buf.ldd;
      gemm(n, columns, D, buf.q + first_row * buf.ldd, buf.ldd, 1, buf.keys, SCORES, buf.scores,
           SCORES);
      for (int64_t i = 0; i < n; i++)
        weigh(buf.scores + i * SCORES, smaller(columns, segment.seen(query + i, key)), columns,
              buf.most[first_row + i], buf.total[first_row + i], out + i * buf.ldd, D);
      gemm(n, D, columns, buf.scores, SCORES, 1, buf.values, buf.ldd, out, buf.ldd, true);
    }
  }
  for (int64_t h = 0; h < group; h++)
    for (int64_t i = 0; i < n; i++) {
      const int64_t at = h * QUERIES + i;
      copy_rows(buf.out + at * buf.ldd, 0, 1, D, 1.0f / buf.total[at],
                y + ((row + i) * s.heads + head + h) * D, 0);
      if (sums) sums[(head + h) * ldsums + row + i] = buf.most[at] + std::log(buf.total[at]);
    }
}

template <class X>
struct Gradients {
  const X *y, *dy;
  const float* sums;
  int64_t ldsums, lddy;
  float* dq;  // a sum over blocks of keys
  X *dk, *dv;
};

struct BackwardBuffers {
  int64_t ldd;
  float *q, *dy, *keys, *keys_turned, *values_turned, *weights, *d_scores, *dk, *dv, *along;
  static int64_t floats(const Shape& s, int64_t longest) {
    return (2 * QUERIES + 3 * KEYS) * pitch(s.head_dim) + 2 * (s.head_dim + QUERIES) * SCORES +
           s.group() * longest;
  }
  BackwardBuffers(const Shape& s, int64_t longest, Scratch& scratch) : ldd(pitch(s.head_dim)) {
    q = scratch.take(QUERIES, ldd);
    dy = scratch.take(QUERIES, ldd);
    keys = scratch.take(KEYS, ldd);
    dk = scratch.take(KEYS, ldd);
    dv = scratch.take(KEYS, ldd);
    keys_turned = scratch.take(s.head_dim, SCORES);
    values_turned = scratch.take(s.head_dim, SCORES);
    weights = scratch.take(QUERIES, SCORES);
    d_scores = scratch.take(QUERIES, SCORES);
    along = scratch.take(s.group(), longest);
  }
};

// Replace a row of scores by the weights, and the gradients of the weights by those of the scores.
INLINE void differentiate(float* weights, float* d_scores, int64_t n, int64_t columns, float sum,
                          float along) {
  for (int64_t j = 0; j < columns; j += LANES) {
    const vec weight = first(n - j, exp(load(weights + j) - sum), 0.0f);
    store(weights + j, weight);
    store(d_scores + j, first(n - j, weight * (load(d_scores + j) - along), 0.0f));
  }
}

// The copy of q contains the scale, and so does the gradient of the keys. The gradient of the
// queries gets it from the copy of the keys.
template <class X>
void attend_back_block(const Shape& s, const Operands<X>& o, const Gradients<X>& g,
                       const Segment& segment, int64_t query, int64_t head, int64_t key, const BackwardBuffers& buf) {
  const int64_t D = s.head_dim, n = smaller(QUERIES, segment.queries - query), ldd = buf.ldd;
  const int64_t columns = smaller(KEYS, segment.seen(query + n - 1, key));
  const int64_t row = segment.first_query + query;
  copy_rows(o.q + row * o.ldq + head * D, o.ldq, n, D, s.scale(), buf.q, ldd);
  copy_rows(g.dy + row * g.lddy + head * D, g.lddy, n, D, 1.0f, buf.dy, ldd);
  gemm(n, columns, D, buf.q, ldd, 1, buf.keys_turned, SCORES, buf.weights, SCORES);
  gemm(n, columns, D, buf.dy, ldd, 1, buf.values_turned, SCORES, buf.d_scores, SCORES);
  const float* sums = g.sums + head * g.ldsums + row;
  const float* along = buf.along + head % s.group() * segment.queries + query;
  for (int64_t i = 0; i < n; i++)
    differentiate(buf.weights + i * SCORES, buf.d_scores + i * SCORES,
                  smaller(columns, segment.seen(query + i, key)), columns, sums[i], along[i]);
  gemm(columns, D, n, buf.weights, 1, SCORES, buf.dy, ldd, buf.dv, ldd, true);
  gemm(columns, D, n, buf.d_scores, 1, SCORES, buf.q, ldd, buf.dk, ldd, true);
  gemm(n, D, columns, buf.d_scores, SCORES, 1, buf.keys, ldd, g.dq + (row * s.heads + head) * D,
       s.heads * D, key > 0);
}

// All gradients of one segment and key head.
template <class X>
void attend_back(const Shape& s, const Operands<X>& o, const Gradients<X>& g,
                 const Segment& segment, int64_t kv_head, const BackwardBuffers& buf) {
  const int64_t D = s.head_dim, group = s.group(), head = kv_head * group;
  for (int64_t h = 0; h < group; h++)  // dy y^T, which all weights of a row share
    for (int64_t i = 0; i < segment.queries; i++) {
      const int64_t row = segment.first_query + i;
      const X *dy = g.dy + row * g.lddy + (head + h) * D;
      const X* y = g.y + (row * s.heads + head + h) * D;
      vec total{};
      for (int64_t d = 0; d < D; d += LANES) total += read(dy + d, D - d) * read(y + d, D - d);
      buf.along[h * segment.queries + i] = sum(total);
    }
  for (int64_t key = 0; key < segment.keys; key += KEYS) {
    const int64_t columns = smaller(KEYS, segment.keys - key), at = segment.first_key + key;
    const X *k = o.k + at * o.ldk + kv_head * D, *v = o.v + at * o.ldv + kv_head * D;
    turn_rows(k, o.ldk, columns, D, buf.keys_turned, SCORES, buf.keys, buf.ldd);
    turn_rows(v, o.ldv, columns, D, buf.values_turned, SCORES, buf.keys, buf.ldd);
    copy_rows(k, o.ldk, columns, D, s.scale(), buf.keys, buf.ldd);
    memset(buf.dk, 0, 4 * KEYS * buf.ldd);
    memset(buf.dv, 0, 4 * KEYS * buf.ldd);
    for (int64_t query = 0; query < segment.queries; query += QUERIES) {
      const int64_t last = smaller(query + QUERIES, segment.queries) - 1;
      if (segment.seen(last, key) <= 0) continue;
      for (int64_t h = 0; h < group; h++)
        attend_back_block(s, o, g, segment, query, head + h, key, buf);
    }
    const int64_t to = (at * s.kv_heads + kv_head) * D;
    copy_rows(buf.dk, buf.ldd, columns, D, 1.0f, g.dk + to, s.kv_heads * D);
    copy_rows(buf.dv, buf.ldd, columns, D, 1.0f, g.dv + to, s.kv_heads * D);
  }
}

// y [queries, heads, head_dim]; `sums` [heads, queries], which the backward pass needs, may be
// null.
template <class X>
void forward(const X* q, const X* k, const X* v, const int64_t* query_bounds,
             const int64_t* key_bounds, X* y, float* sums, int64_t segments, int64_t heads,
             int64_t kv_heads, int64_t head_dim, int64_t ldq, int64_t ldk, int64_t ldv,
             int64_t threads) {
  const Shape s{heads, kv_heads, head_dim};
  const Operands<X> o{q, k, v, ldq, ldk, ldv};
  struct Task {
    int64_t segment, query, kv_head;
  };
  std::vector<Task> tasks;
  for (int64_t i = 0; i < segments; i++) {
    const int64_t queries = query_bounds[i + 1] - query_bounds[i];
    // The last queries see the most keys: the longest tasks start first.
    for (int64_t block = (queries - 1) / QUERIES; block >= 0; block--)
      for (int64_t h = 0; h < kv_heads; h++) tasks.push_back({i, block * QUERIES, h});
  }
  const int64_t queries = query_bounds[segments];
  const bool worth = tasks.size() > 1 && queries * heads * head_dim * KEYS > MIN_PARALLEL_WORK;
  parallel_region(worth ? threads : 1, [&](Team& team) {
    Scratch scratch(ForwardBuffers::floats(s));
    const ForwardBuffers buf(s, scratch);
    for (int64_t i; (i = team.next()) < (int64_t)tasks.size();)
      attend(s, o, Segment(query_bounds, key_bounds, tasks[i].segment), tasks[i].query,
             tasks[i].kv_head, buf, y, sums, queries);
  });
}

// dq [queries, heads, head_dim], dk and dv [keys, kv_heads, head_dim].
template <class X>
void backward(const X* q, const X* k, const X* v, const int64_t* query_bounds,
              const int64_t* key_bounds, const X* y, const float* sums, const X* dy, float* dq,
              X* dk, X* dv, int64_t segments, int64_t heads, int64_t kv_heads, int64_t head_dim,
              int64_t ldq, int64_t ldk, int64_t ldv, int64_t lddy, int64_t threads) {
  const Shape s{heads, kv_heads, head_dim};
  const Operands<X> o{q, k, v, ldq, ldk, ldv};
  const int64_t queries = query_bounds[segments];
  const Gradients<X> g{y, dy, sums, queries, lddy, dq, dk, dv};
  int64_t longest = 0;
  for (int64_t i = 0; i < segments; i++)
    if (query_bounds[i + 1] - query_bounds[i] > longest)
      longest = query_bounds[i + 1] - query_bounds[i];
  const bool worth = queries * heads * head_dim * KEYS > MIN_PARALLEL_WORK;
  parallel_region(worth ? threads : 1, [&](Team& team) {
    Scratch scratch(BackwardBuffers::floats(s, longest));
    const BackwardBuffers buf(s, longest, scratch);
    for (int64_t i; (i = team.next()) < segments * kv_heads;)
      attend_back(s, o, g, Segment(query_bounds, key_bounds, i / kv_heads), i % kv_heads, buf);
  });
}
}  // namespace

#define ATTENTION(X)                                                                              \
  void attention_forward_##X(const X* q, const X* k, const X* v, const int64_t* query_bounds,     \
                             const int64_t* key_bounds, X* y, float* sums, int64_t segments,      \
                             int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t ldq,      \
                             int64_t ldk, int64_t ldv, int64_t threads) {                         \
    forward(q, k, v, query_bounds, key_bounds, y, sums, segments, heads, kv_heads, head_dim, ldq, \
            ldk, ldv, threads);                                                                   \
  }                                                                                               \
  void attention_backward_##X(const X* q, const X* k, const X* v, const int64_t* query_bounds,    \
                              const int64_t* key_bounds, const X* y, const float* sums,           \
                              const X* dy, float* dq, X* dk, X* dv, int64_t segments,             \
                              int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t ldq,     \
                              int64_t ldk, int64_t ldv, int64_t lddy, int64_t threads) {          \
    backward(q, k, v, query_bounds, key_bounds, y, sums, dy, dq, dk, dv, segments, heads,         \
             kv_heads, head_dim, ldq, ldk, ldv, lddy, threads);                                   \
  }
typedef float float32;
extern "C" {
ATTENTION(float32)
ATTENTION(bfloat16)
}
