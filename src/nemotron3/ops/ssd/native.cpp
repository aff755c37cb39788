// The state-space scan in chunks (see torch.py for the mathematics), its gradients, and the
// recurrence for a few tokens.
//
// One thread does all work of a unit: a segment, a group and a block of the heads that share it. It
// goes over the segment's chunks with the carried state in its cache, and all data of a chunk
// (operands, scores, decayed scores) stays there too. Chunks are shorter than on other backends, so
// the work that is quadratic in their length is small. The matrix of decays is therefore computed
// for each head, and no scaling factors are needed that could overflow.
//
// Operands of a chunk are packed: rows of the projection that x, B and C are slices of are often a
// power of two apart, and would all map to a few cache sets. Units follow from shapes alone and
// never contain two segments, so no bit depends on the number of threads or on other segments.
//
// x, B, C, y and their gradients are of type X, float or bfloat16, in memory only. Step sizes, rates
// and states are float32, and so is all that a chunk computes.
#include <vector>

#include "gemm.h"
#include "rows.h"
#include "scratch.h"
#include "team.h"

namespace {
constexpr int64_t CHUNK = 48;  // tokens: whole tiles, and whole vectors
constexpr int64_t BLOCK = 256;  // columns of a block of heads, whose state stays in the cache
constexpr int64_t MIN_PARALLEL_WORK = 1 << 17;  // elements of states, times tokens, from which a second
                                            // thread saves more than it costs
constexpr int STEP_ROWS = LANES < 8 ? LANES : 8;  // rows whose sums are computed together
constexpr float GENTLE = 40.0f;  // log decay of a chunk up to which factors are exact and finite
constexpr double FORGOTTEN = -128.0;  // smallest log decay of a step: its exponential is zero, and
                                      // sums stay exact enough for the small steps beside it
constexpr float GONE = -80.0f;  // smaller log decays give zero, not a denormal number

constexpr int64_t SQUARE = pitch(CHUNK);  // of a row of scores

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE vec decayed(vec log_decay) { return log_decay < GONE ? vec{} : exp(log_decay); }

struct Shape {
  int64_t heads, head_dim, groups, d_state;
  int64_t per_group() const { return heads / groups; }
  // Heads of a block. A single group is cut in two, to have work for two threads.
  int64_t block() const {
    const int64_t fit = BLOCK / head_dim > 1 ? BLOCK / head_dim : 1;
    const int64_t most = groups == 1 ? (heads + 1) / 2 : per_group();
    return smaller(fit, most);
  }
  int64_t blocks() const { return (per_group() + block() - 1) / block(); }
};

template <class X>
struct Operands {
  const X* x;
  const float *dt, *A;
  const X *B, *C;
  const float *D, *initial;
  int64_t ldx, lddt, ldB, ldC;
};

// The work of one thread from a segment's first token to its last (or back).
struct Unit {
  int64_t segment, group, block, head, heads, first, tokens;
  Unit(const Shape& s, const int64_t* bounds, int64_t index) {
    block = index % s.blocks();
    group = index / s.blocks() % s.groups;
    segment = index / s.blocks() / s.groups;
    head = group * s.per_group() + block * s.block();
    heads = smaller(s.block(), (group + 1) * s.per_group() - head);
    first = bounds[segment];
    tokens = bounds[segment + 1] - first;
  }
};

// One head's decays over one chunk, from the running sum a of dt A. The sums are stored in two
// parts, since differences of large sums must be as exact as the steps between them.
struct Decay {
  float step[CHUNK];                 // dt
  float high[CHUNK], low[CHUNK];     // a
  float since_start[CHUNK];          // e^a_l
  float to_end[CHUNK];               // e^(a_end - a_s)
  float grow[CHUNK], shrink[CHUNK];  // e^(a_l - m), e^(m - a_s) for m in the middle, unless steep
  float whole;                       // e^a_end
  bool steep;
};

void decay_of(const float* dt, int64_t lddt, float A, int64_t n, Decay& d) {
  double total = 0, at[CHUNK];
  for (int64_t l = 0; l < n; l++) {
    d.step[l] = dt[l * lddt];
    const double step = (double)d.step[l] * A;
    total += step < FORGOTTEN ? FORGOTTEN : step;
    at[l] = total;
  }
  for (int64_t l = n; l < CHUNK; l++) at[l] = total, d.step[l] = 0;
  for (int64_t l = 0; l < CHUNK; l++) {
    d.high[l] = (float)at[l];
    d.low[l] = (float)(at[l] - d.high[l]);
    d.to_end[l] = (float)(total - at[l]);
    d.shrink[l] = (float)(total / 2 - at[l]);
  }
  d.whole = decayed(splat((float)total))[0];
  d.steep = !(total > -GENTLE);
  for (int64_t l = 0; l < CHUNK; l += LANES) {
    store(d.since_start + l, decayed(load(d.high + l)));
    store(d.to_end + l, decayed(load(d.to_end + l)));
    store(d.grow + l, exp(-load(d.shrink + l)));
    store(d.shrink + l, exp(load(d.shrink + l)));
  }
}

// e^(a_l - a_s) for LANES tokens s, s + 1, ...: any finite number for those after l.
template <bool STEEP>
INLINE vec decay_between(const Decay& d, int64_t l, int64_t s) {
  if (!STEEP) return d.grow[l] * load(d.shrink + s);
  return decayed((d.high[l] - load(d.high + s)) + (d.low[l] - load(d.low + s)));
}

// `value` for those of s, s + 1, ... that are not after l, and zero for the others.
INLINE vec until(int64_t l, int64_t s, vec value) {
  ivec lane;
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) lane[i] = i;
  return lane <= (int32_t)(l - s) ? value : vec{};
}

// Decayed scores: the weight of x_s in y_l, which for s = l includes D.
template <bool STEEP>
void weigh(int64_t n, const float* scores, const Decay& d, float D, float* weights) {
  for (int64_t l = 0; l < n; l++) {
    const int64_t end = smaller(l / TILE_ROWS * TILE_ROWS + TILE_ROWS, n);
    for (int64_t s = 0; s < end; s += LANES) {
      const vec score = until(l, s, load(scores + l * SQUARE + s));
      store(weights + l * SQUARE + s, score * decay_between<STEEP>(d, l, s) * load(d.step + s));
    }
    weights[l * SQUARE + l] += D;
  }
}

template <class From, class To>
void copy_rows(const From* from, int64_t ld, int64_t rows, int64_t columns, To* to,
               int64_t ld_to) {
  for (int64_t r = 0; r < rows; r++) {
    if constexpr (std::is_same_v<From, To>)
      memcpy(to + r * ld_to, from + r * ld, sizeof(To) * columns);
    else copy_numbers(from + r * ld, columns, to + r * ld_to);
  }
}

// to = from * factor, n elements.
template <class X>
INLINE void scale(const X* from, float factor, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load(from + i) * factor);
  for (; i < n; i++) to[i] = number(from[i]) * factor;
}

// Where the results of a chunk are summed: in place, or in float32 beside narrower ones.
template <class X>
INLINE float* sums_of(X* results, float* beside) {
  if constexpr (std::is_same_v<X, float>) return results;
  else return beside;
}

bool is_zero(const float* from, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r++) {
    bool other = false;  // tested once per row, so that the loop vectorises
    for (int64_t i = 0; i < columns; i++) other |= from[r * columns + i] != 0;
    if (other) return false;
  }
  return true;
}

// Scratch memory for the forward pass of one unit, for blocks of `width` columns.
struct ForwardBuffers {
  int64_t ldw, ldn;
  float *x, *late_x, *out, *state, *B, *C, *B_turned, *scores, *weights;
  Decay* decays;
  static int64_t floats(const Shape& s) {
    const int64_t ldw = pitch(s.block() * s.head_dim), ldn = pitch(s.d_state);
    return 3 * CHUNK * ldw + s.d_state * (ldw + SQUARE) + 2 * CHUNK * (ldn + SQUARE) +
           s.block() * (int64_t)sizeof(Decay) / 4;
  }
  ForwardBuffers(const Shape& s, Scratch& scratch)
      : ldw(pitch(s.block() * s.head_dim)), ldn(pitch(s.d_state)) {
    x = scratch.take(CHUNK, ldw);
    late_x = scratch.take(CHUNK, ldw);
    out = scratch.take(CHUNK, ldw);
    state = scratch.take(s.d_state, ldw);
    B = scratch.take(CHUNK, ldn);
    C = scratch.take(CHUNK, ldn);
    B_turned = scratch.take(s.d_state, SQUARE);
    scores = scratch.take(CHUNK, SQUARE);
    weights = scratch.take(CHUNK, SQUARE);
    decays = (Decay*)scratch.take(s.block(), sizeof(Decay) / 4);
  }
};

// The state is [d_state, columns of all heads], the layout for products with C and B^T.
template <class X>
void scan(const Shape& s, const Operands<X>& o, const Unit& u, const ForwardBuffers& buf, X* y,
          float* final) {
  constexpr bool IN_PLACE = std::is_same_v<X, float>;
  const int64_t P = s.head_dim, N = s.d_state, width = u.heads * P, all = s.heads * P;
  const int64_t ldy = IN_PLACE ? all : buf.ldw;
  const int64_t at_state = (u.segment * s.heads + u.head) * P * N;
  bool carries = !is_zero(o.initial + at_state, width, N);
  transpose(o.initial + at_state, N, width, N, buf.state, buf.ldw);
  for (int64_t first = u.first; first < u.first + u.tokens; first += CHUNK) {
    const int64_t n = smaller(CHUNK, u.first + u.tokens - first);
    const X* x = o.x + first * o.ldx + u.head * P;
    X* results = y + first * all + u.head * P;
    float* out = sums_of(results, buf.out);
    copy_rows(o.B + first * o.ldB + u.group * N, o.ldB, n, N, buf.B, buf.ldn);
    copy_rows(o.C + first * o.ldC + u.group * N, o.ldC, n, N, buf.C, buf.ldn);
    copy_rows(x, o.ldx, n, width, buf.x, buf.ldw);
    transpose(buf.B, buf.ldn, n, N, buf.B_turned, SQUARE);
    gemm_to_lower(n, N, buf.C, buf.ldn, buf.B_turned, SQUARE, buf.scores, SQUARE);
    if (carries) gemm(n, width, N, buf.C, buf.ldn, 1, buf.state, buf.ldw, out, ldy);
    for (int64_t h = 0; h < u.heads; h++) {
      Decay& d = buf.decays[h];
      decay_of(o.dt + first * o.lddt + u.head + h, o.lddt, o.A[u.head + h], n, d);
      if (carries)
        for (int64_t l = 0; l < n; l++)
          scale(out + l * ldy + h * P, d.since_start[l], P, out + l * ldy + h * P);
      (d.steep ? weigh<true> : weigh<false>)(n, buf.scores, d, o.D[u.head + h], buf.weights);
      gemm_lower(n, P, buf.weights, SQUARE, buf.x + h * P, buf.ldw, out + h * P, ldy, carries);
      for (int64_t l = 0; l < n; l++)
        scale(buf.x + l * buf.ldw + h * P, d.step[l] * d.to_end[l], P,
              buf.late_x + l * buf.ldw + h * P);
    }
    if (!IN_PLACE) copy_rows(out, ldy, n, width, results, all);
    for (int64_t i = 0; i < N && carries; i++)
      for (int64_t h = 0; h < u.heads; h++) {
        float* row = buf.state + i * buf.ldw + h * P;
        scale(row, buf.decays[h].whole, P, row);
      }
    gemm(N, width, n, buf.B, 1, buf.ldn, buf.late_x, buf.ldw, buf.state, buf.ldw, carries);
    carries = true;
  }
  transpose(buf.state, buf.ldw, N, width, final + at_state, N);
}

// out[r] = the dot product of row r of a and row r of b.
void row_dots(int64_t rows, int64_t columns, const float* a, int64_t lda, const float* b,
              int64_t ldb, float* out) {
  for (int64_t first = 0; first < rows; first += LANES) {
    const int64_t n = smaller(LANES, rows - first);
    vec totals[LANES]{};
    for (int64_t r = 0; r < n; r++) {
      const float *x = a + (first + r) * lda, *y = b + (first + r) * ldb;
      int64_t i = 0;
      for (; i + LANES <= columns; i += LANES) totals[r] += load(x + i) * load(y + i);
      if (i < columns) totals[r] += load_part(x + i, columns - i) * load_part(y + i, columns - i);
    }
    store_part(out + first, detail::sums(totals), n);
  }
}

// to += from * factor, n elements.
INLINE void add_scaled(const float* from, float factor, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load(to + i) + load(from + i) * factor);
  for (; i < n; i++) to[i] += from[i] * factor;
}

// Sums of the gradients of a head's decayed scores, from `products` (dy_l . x_s). The diagonal does
// not decay: its terms would cancel in the gradients of the decays and are left out.
struct Changes {
  float rows[CHUNK];      // gradient of a_l, from the earlier tokens in y_l
  float columns[CHUNK];   // of dt_s (times dt_s: of -a_s), from token s in later y_l
  float diagonal[CHUNK];  // of dt_l, from token l in y_l
};

template <bool STEEP>
void differentiate(int64_t n, const float* scores, const float* products, const Decay& d, float D,
                   bool add, float* weights, float* d_scores, Changes& changes) {
  memset(changes.columns, 0, sizeof changes.columns);
  for (int64_t first = 0; first < n; first += LANES) {
    vec totals[LANES]{};
    for (int64_t l = first; l < smaller(first + LANES, n); l++) {
      const int64_t end = smaller(l / TILE_ROWS * TILE_ROWS + TILE_ROWS, n), row = l * SQUARE;
      vec total{};
      for (int64_t s = 0; s < end; s += LANES) {
        const vec score = until(l, s, load(scores + row + s));
        const vec product = until(l, s, load(products + row + s));
        const vec decay = decay_between<STEEP>(d, l, s), step = load(d.step + s);
        const vec change = until(l - 1, s, score * decay * product);
        store(changes.columns + s, load(changes.columns + s) + change);
        total += change * step;
        store(weights + row + s, score * decay * step);
        const vec earlier = add ? load(d_scores + row + s) : vec{};
        store(d_scores + row + s, earlier + product * decay * step);
      }
      totals[l - first] = total;
      weights[row + l] += D;
      changes.diagonal[l] = scores[row + l] * products[row + l];
    }
    store(changes.rows + first, detail::sums(totals));
  }
}

template <class X>
struct Gradients {
  const X* dy;
  const float* dfinal;  // null is zero
  int64_t lddy;
  X* dx;
  float *ddt, *dB, *dC, *dinitial;  // all but ddt may be null if not needed
  double *dA, *dD;                       // [segments, heads]
  int64_t tokens, ldB;  // of dB and dC, which have one plane of all tokens per block
};

struct BackwardBuffers {
  int64_t ldw, ldn;
  float *x, *late_x, *dy, *early_dy, *late_dx, *dx;  // [CHUNK, ldw]
  float *B, *C, *dC, *from_state;                  // [CHUNK, ldn]
  float *scores, *d_scores, *products, *weights;   // [CHUNK, SQUARE]
  float *x_turned, *B_turned;                      // [head_dim and d_state, SQUARE]
  float *later, *later_turned;                     // d(state): [width, ldn], and transposed
  float* states;                                   // before each chunk: [chunks, width, ldn]
  Decay* decays;
  static int64_t floats(const Shape& s, int64_t chunks) {
    const int64_t width = s.block() * s.head_dim, ldw = pitch(width), ldn = pitch(s.d_state);
    return CHUNK * (6 * ldw + 4 * ldn + 4 * SQUARE) + (s.head_dim + s.d_state) * SQUARE +
           (chunks + 1) * width * ldn + s.d_state * ldw + s.block() * (int64_t)sizeof(Decay) / 4;
  }
  BackwardBuffers(const Shape& s, int64_t chunks, Scratch& scratch)
      : ldw(pitch(s.block() * s.head_dim)), ldn(pitch(s.d_state)) {
    for (float** piece : {&x, &late_x, &dy, &early_dy, &late_dx, &dx})
      *piece = scratch.take(CHUNK, ldw);
    for (float** piece : {&B, &C, &dC, &from_state}) *piece = scratch.take(CHUNK, ldn);
    for (float** piece : {&scores, &d_scores, &products, &weights})
      *piece = scratch.take(CHUNK, SQUARE);
    const int64_t width = s.block() * s.head_dim;
    B_turned = scratch.take(s.d_state, SQUARE);
    later = scratch.take(width, ldn);
    later_turned = scratch.take(s.d_state, ldw);
    states = scratch.take(chunks * width, ldn);
    decays = (Decay*)scratch.take(s.block(), sizeof(Decay) / 4);
    x_turned = scratch.take(s.head_dim, SQUARE);
  }
};

// The tokens of a chunk.
struct Span {
  int64_t first, n;
  Span(const Unit& u, int64_t chunk)
      : first(u.first + chunk * CHUNK), n(smaller(CHUNK, u.tokens - chunk * CHUNK)) {}
};

// to = factor_h * from for the rows of each head h of a state [rows of all heads, d_state].
void decay_state(const Shape& s, const Unit& u, const BackwardBuffers& buf, const float* from,
                 float* to) {
  for (int64_t h = 0; h < u.heads; h++)
    for (int64_t p = h * s.head_dim; p < (h + 1) * s.head_dim; p++)
      scale(from + p * buf.ldn, buf.decays[h].whole, s.d_state, to + p * buf.ldn);
}

// Recompute the state before each chunk, as [columns of all heads, d_state]. Returns whether the
// first one is nonzero.
template <class X>
bool rescan(const Shape& s, const Operands<X>& o, const Unit& u, const BackwardBuffers& buf,
            int64_t chunks) {
  const int64_t P = s.head_dim, N = s.d_state, width = u.heads * P, size = width * buf.ldn;
  const float* initial = o.initial + (u.segment * s.heads + u.head) * P * N;
  const bool continues = !is_zero(initial, width, N);
  copy_rows(initial, N, width, N, buf.states, buf.ldn);
  for (int64_t c = 0; c + 1 < chunks; c++) {
    const Span span(u, c);
    copy_rows(o.B + span.first * o.ldB + u.group * N, o.ldB, span.n, N, buf.B, buf.ldn);
    for (int64_t h = 0; h < u.heads; h++) {
      Decay& d = buf.decays[h];
      const int64_t head = u.head + h;
      decay_of(o.dt + span.first * o.lddt + head, o.lddt, o.A[head], span.n, d);
      for (int64_t l = 0; l < span.n; l++)
        scale(o.x + (span.first + l) * o.ldx + head * P, d.step[l] * d.to_end[l], P,
              buf.late_x + l * buf.ldw + h * P);
    }
    float *before = buf.states + c * size, *after = before + size;
    const bool add = c || continues;
    if (add) decay_state(s, u, buf, before, after);
    gemm(width, N, span.n, buf.late_x, 1, buf.ldw, buf.B, buf.ldn, after, buf.ldn, add);
  }
  return continues;
}

// Gradients of one head of one chunk. `early`: the state before the chunk is nonzero; `late`: the
// gradient of the state after it is nonzero.
template <class X>
void scan_back_head(const Shape& s, const Operands<X>& o, const Gradients<X>& g, const Unit& u,
                    const BackwardBuffers& buf, const Span& span, int64_t h, const float* state,
                    bool early, bool late) {
  const int64_t P = s.head_dim, N = s.d_state, n = span.n, head = u.head + h, ldw = buf.ldw;
  const float *x = buf.x + h * P, *dy = buf.dy + h * P, *late_dx = buf.late_dx + h * P;
  const Decay& d = buf.decays[h];
  float early_change[CHUNK]{}, late_change[CHUNK]{};
  Changes changes;
  transpose(x, ldw, n, P, buf.x_turned, SQUARE);
  gemm_to_lower(n, P, dy, ldw, buf.x_turned, SQUARE, buf.products, SQUARE);
  (d.steep ? differentiate<true> : differentiate<false>)(
      n, buf.scores, buf.products, d, o.D[head], h > 0, buf.weights, buf.d_scores, changes);
  constexpr bool IN_PLACE = std::is_same_v<X, float>;
  X* results = g.dx ? g.dx + span.first * s.heads * P + head * P : nullptr;
  float* dx = results ? sums_of(results, buf.dx + h * P) : nullptr;
  const int64_t lddx = IN_PLACE ? s.heads * P : ldw;
  if (dx) gemm_lower_turned(n, P, buf.weights, SQUARE, dy, ldw, dx, lddx);
  if (late) row_dots(n, P, x, ldw, late_dx, ldw, late_change);
  for (int64_t l = 0; l < n; l++) {
    const float late_weight = d.step[l] * d.to_end[l];
    scale(x + l * ldw, late_weight, P, buf.late_x + l * ldw + h * P);
    scale(dy + l * ldw, d.since_start[l], P, buf.early_dy + l * ldw + h * P);
    if (late && dx) add_scaled(late_dx + l * ldw, late_weight, P, dx + l * lddx);
  }
  if (!IN_PLACE && dx) copy_rows(dx, lddx, n, P, results, s.heads * P);
  double at_end = 0;  // gradient of a_end
  if (early) {
    state += h * P * buf.ldn;
    gemm(n, N, P, buf.early_dy + h * P, ldw, 1, state, buf.ldn, buf.from_state, buf.ldn);
    row_dots(n, N, buf.from_state, buf.ldn, buf.C, buf.ldn, early_change);
    for (int64_t l = 0; l < n && g.dC; l++)
      add_scaled(buf.from_state + l * buf.ldn, 1.0f, N, buf.dC + l * buf.ldn);
    if (late)
      for (int64_t p = 0; p < P; p += CHUNK) {
        float sums[CHUNK];
        const int64_t rows = smaller(CHUNK, P - p);
        row_dots(rows, N, state + p * buf.ldn, buf.ldn, buf.later + (h * P + p) * buf.ldn,
                 buf.ldn, sums);
        for (int64_t r = 0; r < rows; r++) at_end += d.whole * sums[r];
      }
  }
  for (int64_t l = 0; l < n; l++) at_end += d.step[l] * d.to_end[l] * late_change[l];
  // The step of token l enters the running sum of this token and all after it.
  double sum = at_end, dA = 0, dD = 0;
  float* ddt = g.ddt + span.first * s.heads + head;
  for (int64_t l = n - 1; l >= 0; l--) {
    const float late_dt = d.to_end[l] * late_change[l];
    const float earlier = changes.rows[l] + early_change[l];
    sum += (double)earlier - (double)(d.step[l] * (changes.columns[l] + late_dt));
    if (d.step[l] * o.A[head] < GONE) sum = 0;  // the decay is zero: the sum is rounding error
    ddt[l * s.heads] =
        (float)(sum * o.A[head] + changes.columns[l] + changes.diagonal[l] + late_dt);
    dA += sum * d.step[l];
    dD += buf.products[l * SQUARE + l];
  }
  g.dA[u.segment * s.heads + head] += dA;
  g.dD[u.segment * s.heads + head] += dD;
}

// All gradients of a unit, chunk by chunk from the last to the first.
template <class X>
void scan_back(const Shape& s, const Operands<X>& o, const Gradients<X>& g, const Unit& u,
               const BackwardBuffers& buf) {
  const int64_t P = s.head_dim, N = s.d_state, width = u.heads * P;
  const int64_t chunks = (u.tokens + CHUNK - 1) / CHUNK;
  const int64_t at_state = (u.segment * s.heads + u.head) * P * N;
  const bool continues = rescan(s, o, u, buf, chunks);
  if (g.dfinal) copy_rows(g.dfinal + at_state, N, width, N, buf.later, buf.ldn);
  bool late = g.dfinal;
  for (int64_t c = chunks - 1; c >= 0; c--) {
    const Span span(u, c);
    const int64_t n = span.n;
    const bool early = c || continues;
    const float* state = buf.states + c * width * buf.ldn;
    copy_rows(o.B + span.first * o.ldB + u.group * N, o.ldB, n, N, buf.B, buf.ldn);
    copy_rows(o.C + span.first * o.ldC + u.group * N, o.ldC, n, N, buf.C, buf.ldn);
    copy_rows(o.x + span.first * o.ldx + u.head * P, o.ldx, n, width, buf.x, buf.ldw);
    copy_rows(g.dy + span.first * g.lddy + u.head * P, g.lddy, n, width, buf.dy, buf.ldw);
    transpose(buf.B, buf.ldn, n, N, buf.B_turned, SQUARE);
    gemm_to_lower(n, N, buf.C, buf.ldn, buf.B_turned, SQUARE, buf.scores, SQUARE);
    if (late) {
      transpose(buf.later, buf.ldn, width, N, buf.later_turned, buf.ldw);
      gemm(n, width, N, buf.B, buf.ldn, 1, buf.later_turned, buf.ldw, buf.late_dx, buf.ldw);
    }
    memset(buf.dC, 0, 4 * n * buf.ldn);
    for (int64_t h = 0; h < u.heads; h++) {
      const int64_t head = u.head + h;
      decay_of(o.dt + span.first * o.lddt + head, o.lddt, o.A[head], n, buf.decays[h]);
      scan_back_head(s, o, g, u, buf, span, h, state, early, late);
    }
    const int64_t at_group = (u.block * g.tokens + span.first) * g.ldB + u.group * N;
    if (g.dC) {
      gemm_lower(n, N, buf.d_scores, SQUARE, buf.B, buf.ldn, buf.dC, buf.ldn, true);
      copy_rows(buf.dC, buf.ldn, n, N, g.dC + at_group, g.ldB);
    }
    if (g.dB) {
      float* dB = g.dB + at_group;
      if (late)
        gemm(n, N, width, buf.late_x, buf.ldw, 1, buf.later, buf.ldn, dB, g.ldB);
      gemm_lower_turned(n, N, buf.d_scores, SQUARE, buf.C, buf.ldn, dB, g.ldB, late);
    }
    if (c || g.dinitial) {
      if (late) decay_state(s, u, buf, buf.later, buf.later);
      gemm(width, N, n, buf.early_dy, 1, buf.ldw, buf.C, buf.ldn, buf.later, buf.ldn, late);
      late = true;
    }
  }
  if (g.dinitial) copy_rows(buf.later, buf.ldn, width, N, g.dinitial + at_state, N);
}

// to [n] = the sum of `planes` rows of n.
void add_planes(const float* planes, int64_t count, int64_t n, float* to, int64_t threads) {
  parallel_region(threads, [&](Team& team) {
    const Range part = team.share(n);
    for (int64_t i = part.first; i < part.last; i++) {
      float total = planes[i];
      for (int64_t k = 1; k < count; k++) total += planes[k * n + i];
      to[i] = total;
    }
  });
}

// One token of R consecutive rows of a head's state: h = decay h + x B^T, y = h C + D x.
template <int R, class X>
INLINE void step_rows(int64_t N, const float* h, float* to, float decay, float dt, float D,
                      const X* x, const X* B, const X* C, X* y) {
  vec total[LANES]{};
  float added[R];
  for (int r = 0; r < R; r++) added[r] = dt * number(x[r]);
  int64_t n = 0;
  for (; n + LANES <= N; n += LANES) {
    const vec b = load(B + n), c = load(C + n);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const vec state = decay * load(h + r * N + n) + added[r] * b;
      store(to + r * N + n, state);
      total[r] += state * c;
    }
  }
  if (n < N)
    for (int r = 0; r < R; r++) {
      const vec added_part = added[r] * load_part(B + n, N - n);
      const vec state = decay * load_part(h + r * N + n, N - n) + added_part;
      store_part(to + r * N + n, state, N - n);
      total[r] += state * load_part(C + n, N - n);
    }
  const vec sums = detail::sums(total);
  for (int r = 0; r < R; r++) put(y + r, sums[r] + D * number(x[r]));
}

// Where the states of a sequence's tokens are: the first token reads `from`, each writes `to`, and
// the next reads that. `stride` is the distance between two tokens' states (0 if each replaces the
// last).
struct Intermediate {
  const float* from;
  float* to;
  int64_t stride;
};

// The recurrence, token by token. Only the first token reads the state from memory; the others find
// it in the cache.
template <class X>
void steps_of_head(const Shape& s, const Operands<X>& o, int64_t row, int64_t length, int64_t head,
                   const Intermediate& intermediate, X* y) {
  const int64_t P = s.head_dim, N = s.d_state, group = head / s.per_group();
  const float* from = intermediate.from;
  float* to = intermediate.to;
  for (int64_t t = row * length; t < (row + 1) * length; t++, from = to, to += intermediate.stride) {
    const float dt = o.dt[t * o.lddt + head], D = o.D[head];
    const float decay = decayed(splat(dt * o.A[head]))[0];
    const X *x = o.x + t * o.ldx + head * P, *B = o.B + t * o.ldB + group * N;
    const X* C = o.C + t * o.ldC + group * N;
    X* out = y + (t * s.heads + head) * P;
    int64_t p = 0;
    for (; p + STEP_ROWS <= P; p += STEP_ROWS)
      step_rows<STEP_ROWS>(N, from + p * N, to + p * N, decay, dt, D, x + p, B, C, out + p);
    for (; p < P; p++)
      step_rows<1>(N, from + p * N, to + p * N, decay, dt, D, x + p, B, C, out + p);
  }
}

// As ssd_forward, for `length` tokens of each of `rows` sequences, which continue from
// states[slots[r]] [heads, head_dim, d_state]. The states are updated in place unless there is
// `intermediate` [rows, length, ...], whose rows are `ld_intermediate` elements apart: it then gets
// the state after each token.
template <class X>
void steps(Team& team, const X* x, const float* dt, const float* A, const X* B, const X* C,
           const float* D, float* states, const int64_t* slots, float* intermediate, X* y,
           int64_t rows, int64_t length, int64_t heads, int64_t head_dim, int64_t groups,
           int64_t d_state, int64_t ldx, int64_t lddt, int64_t ldB, int64_t ldC, int64_t ld_intermediate) {
  const Shape s{heads, head_dim, groups, d_state};
  const Operands<X> o{x, dt, A, B, C, D, states, ldx, lddt, ldB, ldC};
  const int64_t of_head = head_dim * d_state, size = heads * of_head;
  const Range part = team.share(rows * heads);
  for (int64_t i = part.first; i < part.last; i++) {
    const int64_t row = i / heads, head = i % heads;
    float* state = states + slots[row] * size + head * of_head;
    const Intermediate kept = intermediate ? Intermediate{state, intermediate + row * ld_intermediate + head * of_head, size}
                             : Intermediate{state, state, 0};
    steps_of_head(s, o, row, length, head, kept, y);
  }
}

// y [tokens, heads, head_dim] and the states after each segment.
template <class X>
void forward(const X* x, const float* dt, const float* A, const X* B, const X* C, const float* D,
             const float* initial, const int64_t* bounds, X* y, float* final, int64_t segments,
             int64_t heads, int64_t head_dim, int64_t groups, int64_t d_state, int64_t ldx,
             int64_t lddt, int64_t ldB, int64_t ldC, int64_t threads) {
  const Shape s{heads, head_dim, groups, d_state};
  const Operands<X> o{x, dt, A, B, C, D, initial, ldx, lddt, ldB, ldC};
  const int64_t units = segments * groups * s.blocks();
  const bool worth = units > 1 && bounds[segments] * heads * head_dim * d_state > MIN_PARALLEL_WORK;
  parallel_region(worth ? threads : 1, [&](Team& team) {
    Scratch scratch(ForwardBuffers::floats(s));
    const ForwardBuffers buf(s, scratch);
    for (int64_t i; (i = team.next()) < units;) scan(s, o, Unit(s, bounds, i), buf, y, final);
  });
}

// Gradients from those of y and of the final states (which may be null): dx [tokens, heads,
// head_dim], ddt [tokens, heads], dA and dD [heads], dB and dC [tokens, groups, d_state], dinitial.
// dx, dB, dC and dinitial may be null.
template <class X>
void backward(const X* x, const float* dt, const float* A, const X* B, const X* C, const float* D,
              const float* initial, const int64_t* bounds, const X* dy, const float* dfinal, X* dx,
              float* ddt, float* dA, float* dB, float* dC, float* dD, float* dinitial,
              int64_t segments, int64_t heads, int64_t head_dim, int64_t groups, int64_t d_state,
              int64_t ldx, int64_t lddt, int64_t ldB, int64_t ldC, int64_t lddy, int64_t threads) {
  const Shape s{heads, head_dim, groups, d_state};
  const Operands<X> o{x, dt, A, B, C, D, initial, ldx, lddt, ldB, ldC};
  const int64_t tokens = bounds[segments], units = segments * groups * s.blocks();
  const int64_t width = groups * d_state, planes = s.blocks() > 1 ? s.blocks() * tokens * width : 0;
  std::vector<float> dB_planes(dB ? planes : 0), dC_planes(dC ? planes : 0);
  std::vector<double> dA_parts(segments * heads), dD_parts(segments * heads);
  const Gradients<X> g{dy,
                    dfinal,
                    lddy,
                    dx,
                    ddt,
                    dB && planes ? dB_planes.data() : dB,
                    dC && planes ? dC_planes.data() : dC,
                    dinitial,
                    dA_parts.data(),
                    dD_parts.data(),
                    tokens,
                    width};
  int64_t longest = 0;
  for (int64_t i = 0; i < segments; i++)
    if (bounds[i + 1] - bounds[i] > longest) longest = bounds[i + 1] - bounds[i];
  const int64_t chunks = (longest + CHUNK - 1) / CHUNK;
  const bool worth = units > 1 && tokens * heads * head_dim * d_state > MIN_PARALLEL_WORK;
  parallel_region(worth ? threads : 1, [&](Team& team) {
    Scratch scratch(BackwardBuffers::floats(s, chunks));
    const BackwardBuffers buf(s, chunks, scratch);
    for (int64_t i; (i = team.next()) < units;) scan_back(s, o, g, Unit(s, bounds, i), buf);
  });
  if (planes && dB) add_planes(g.dB, s.blocks(), tokens * width, dB, threads);
  if (planes && dC) add_planes(g.dC, s.blocks(), tokens * width, dC, threads);
  for (int64_t h = 0; h < heads; h++) {
    double a = 0, d = 0;
    for (int64_t i = 0; i < segments; i++) a += dA_parts[i * heads + h];
    for (int64_t i = 0; i < segments; i++) d += dD_parts[i * heads + h];
    dA[h] = (float)a;
    dD[h] = (float)d;
  }
}
}  // namespace

PARALLEL_KERNEL(ssd_steps_float32, steps<float>)
PARALLEL_KERNEL(ssd_steps_bfloat16, steps<bfloat16>)

#define SCAN(X)                                                                                    \
  void ssd_forward_##X(const X* x, const float* dt, const float* A, const X* B, const X* C,        \
                       const float* D, const float* initial, const int64_t* bounds, X* y,          \
                       float* final, int64_t segments, int64_t heads, int64_t head_dim,            \
                       int64_t groups, int64_t d_state, int64_t ldx, int64_t lddt, int64_t ldB,    \
                       int64_t ldC, int64_t threads) {                                             \
    forward(x, dt, A, B, C, D, initial, bounds, y, final, segments, heads, head_dim, groups,       \
            d_state, ldx, lddt, ldB, ldC, threads);                                                \
  }                                                                                                \
  void ssd_backward_##X(const X* x, const float* dt, const float* A, const X* B, const X* C,       \
                        const float* D, const float* initial, const int64_t* bounds, const X* dy,  \
                        const float* dfinal, X* dx, float* ddt, float* dA, float* dB, float* dC,   \
                        float* dD, float* dinitial, int64_t segments, int64_t heads,               \
                        int64_t head_dim, int64_t groups, int64_t d_state, int64_t ldx,            \
                        int64_t lddt, int64_t ldB, int64_t ldC, int64_t lddy, int64_t threads) {   \
    backward(x, dt, A, B, C, D, initial, bounds, dy, dfinal, dx, ddt, dA, dB, dC, dD, dinitial,    \
             segments, heads, head_dim, groups, d_state, ldx, lddt, ldB, ldC, lddy, threads);      \
  }
typedef float float32;
extern "C" {
SCAN(float32)
SCAN(bfloat16)
}
