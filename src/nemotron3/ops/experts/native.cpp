// Routed experts: y_t = sum over choices i of w_ti down_i act(up_i x_t), and its gradients.
//
// Rows (a token's choices) are ordered by expert, and one thread does all work of an expert: gather
// the tokens, first product, activation times the router's weight, second product. It handles a
// block of rows at a time, so that the values between the two products stay in the cache. A token's
// results are then added in the order of its choices. No sum depends on the number of threads or on
// how many tokens an expert has, except that a call with few rows per expert, which uses rows.h,
// sums in another order than a call with many.
#include <cmath>

#include "experts.h"
#include "gemm.h"
#include "low_rank.h"
#include "packed.h"
#include "rows.h"
#include "scratch.h"
#include "team.h"

namespace {
constexpr int64_t MIN_PARALLEL_WORK = 1 << 14;  // elements below which a second thread costs more

// Low-rank changes of both matrices of the experts.
struct Changes {
  LowRank up, down;
  int64_t rank() const { return up.rank > down.rank ? up.rank : down.rank; }
  Changes of(const Shape& s, int64_t expert) const {
    return {of_expert(up, expert, s.up_rows(), s.width),
            of_expert(down, expert, s.width, s.hidden)};
  }
};

// Scratch memory for a block of rows: the tokens, the values between the products, and those
// between the two factors of a change.
struct ForwardBuffers {
  int64_t ldx, ldh, rank;
  float *xs, *h, *narrow;
  int64_t row() const { return ldx + ldh; }
  int64_t floats() const { return most_rows(row()) * (row() + rank); }
  ForwardBuffers(const Shape& s, int64_t rank)
      : ldx(pitch(s.width)), ldh(pitch(s.up_rows())), rank(rank) {}
  void take(Scratch& scratch) {
    xs = scratch.take(most_rows(row()), ldx);
    h = scratch.take(most_rows(row()), ldh);
    narrow = scratch.take(most_rows(row()), rank);
  }
};

// All rows of one expert, by one thread. The results of the first product are written to `kept`
// [rows, up_rows] if it is not null.
template <class W>
void forward_expert(const Shape& s, const Order& order, int64_t expert, const float* x,
                    int64_t ldx, const float* weights, W up, W down, const Changes& changes,
                    const ForwardBuffers& buf, float* kept, float* outputs) {
  const int64_t begin = order.bounds[expert], end = order.bounds[expert + 1];
  const int64_t up_rows = s.up_rows(), block = block_rows(end - begin, buf.row());
  for (int64_t first = begin; first < end; first += block) {
    const int64_t rows = end - first < block ? end - first : block;
    const int64_t* sources = order.sources + first;
    gather(x, ldx, sources, s.choices, rows, s.width, buf.xs, buf.ldx);
    gemm_turned(rows, up_rows, s.width, buf.xs, buf.ldx, 1, up, s.width, buf.h, buf.ldh, false,
                down);
    if (changes.up.A) {
      narrow_rows(rows, s.width, buf.xs, buf.ldx, changes.up, buf.narrow);
      add_change(rows, 0, up_rows, buf.narrow, changes.up, buf.h, buf.ldh);
    }
    for (int64_t r = 0; r < rows; r++) {
      float* h = buf.h + r * buf.ldh;
      if (kept) memcpy(kept + (first + r) * up_rows, h, 4 * up_rows);
      activate(h, s.hidden, s.hidden, s.activation, weights[sources[r]], h);
    }
    gemm_turned(rows, s.width, s.hidden, buf.h, buf.ldh, 1, down, s.hidden,
                outputs + first * s.width, s.width);
    if (changes.down.A) {
      narrow_rows(rows, s.hidden, buf.h, buf.ldh, changes.down, buf.narrow);
      add_change(rows, 0, s.width, buf.narrow, changes.down, outputs + first * s.width, s.width);
    }
  }
}

// Few rows for each expert: the time goes into reading the matrices, so every thread reads a part
// of each. `units` [rows, up_rows] is scratch memory for the values between the products.
template <class W>
void forward_few(Team& team, const Shape& s, const Order& order, const float* x, int64_t ldx,
                 const float* weights, W up, W down, const Changes& changes, float* units,
                 float* outputs, float* y) {
  const int64_t up_rows = s.up_rows();
  const Range hidden = team.share(s.hidden, LANES), columns = team.share(s.width, LANES);
  const int64_t most = s.tokens * s.choices;  // of one expert: a token may choose it twice
  Scratch scratch(most * (s.width + changes.rank()));
  float* xs = scratch.take(most, s.width);
  float* narrow = scratch.take(most, changes.rank());  // every thread computes the few numbers
  for (int64_t e = 0; e < s.experts; e++) {
    const int64_t first = order.bounds[e], rows = order.bounds[e + 1] - first;
    if (rows == 0) continue;
    const int64_t* sources = order.sources + first;
    gather(x, ldx, sources, s.choices, rows, s.width, xs, s.width);
    const W matrix = from_row(up, e * up_rows, s.width);
    float* h = units + first * up_rows;
    for (int64_t at = 0; at < up_rows; at += s.hidden)
      few_rows(rows, xs, s.width, matrix, at + hidden.first, at + hidden.last, s.width, h, up_rows);
    if (const LowRank change = changes.of(s, e).up; change.A) {
      narrow_rows(rows, s.width, xs, s.width, change, narrow);
      for (int64_t at = 0; at < up_rows; at += s.hidden)
        add_change(rows, at + hidden.first, at + hidden.last, narrow, change, h, up_rows);
    }
    for (int64_t r = 0; r < rows; r++) {
      float* part = h + r * up_rows + hidden.first;
      activate(part, hidden.last - hidden.first, s.hidden, s.activation, weights[sources[r]], part);
    }
  }
  team.wait();
  for (int64_t e = 0; e < s.experts; e++) {
    const int64_t first = order.bounds[e], rows = order.bounds[e + 1] - first;
    if (rows == 0) continue;
    const float* h = units + first * up_rows;
    few_rows(rows, h, up_rows, from_row(down, e * s.width, s.hidden), columns.first, columns.last,
             s.hidden, outputs + first * s.width, s.width);
    if (const LowRank change = changes.of(s, e).down; change.A) {
      narrow_rows(rows, s.hidden, h, up_rows, change, narrow);
      add_change(rows, columns.first, columns.last, narrow, change, outputs + first * s.width,
                 s.width);
    }
  }
  for (int64_t t = 0; t < s.tokens; t++)
    combine(outputs, order.places, s.choices, s.width, columns, t, y);
}

template <class W>
void forward_many(Team& team, const Shape& s, const Order& order, const float* x, int64_t ldx,
                  const float* weights, W up, W down, const Changes& changes, float* kept,
                  float* outputs, float* y) {
  ForwardBuffers buf(s, changes.rank());
  Scratch scratch(buf.floats());
  buf.take(scratch);
  for (int64_t e; (e = team.next()) < s.experts;)
    if (order.bounds[e] < order.bounds[e + 1])
      forward_expert(s, order, e, x, ldx, weights, from_row(up, e * s.up_rows(), s.width),
                     from_row(down, e * s.width, s.hidden), changes.of(s, e), buf, kept, outputs);
  team.wait();
  const Range tokens = team.share(s.tokens);
  for (int64_t t = tokens.first; t < tokens.last; t++)
    combine(outputs, order.places, s.choices, s.width, {0, s.width}, t, y);
}

struct BackwardBuffers {
  int64_t ldx, ldu, ldh;
  float *xs, *dy, *h, *a, *da;
  int64_t row() const { return 2 * ldx + ldu + 2 * ldh; }
  int64_t floats() const { return most_rows(row()) * row(); }
  explicit BackwardBuffers(const Shape& s)
      : ldx(pitch(s.width)), ldu(pitch(s.up_rows())), ldh(pitch(s.hidden)) {}
  void take(Scratch& scratch) {
    const int64_t rows = most_rows(row());
    xs = scratch.take(rows, ldx);
    dy = scratch.take(rows, ldx);
    h = scratch.take(rows, ldu);
    a = scratch.take(rows, ldh);
    da = scratch.take(rows, ldh);
  }
};

template <class W>
void backward_expert(const Shape& s, const Order& order, int64_t expert, const float* x,
                     int64_t ldx, const float* weights, W up, W down,
                     const float* kept, const float* grad, int64_t ldgrad, float* dxs,
                     float* d_weights, float* d_up, float* d_down, const BackwardBuffers& buf) {
  const int64_t begin = order.bounds[expert], end = order.bounds[expert + 1];
  const int64_t up_rows = s.up_rows();
  if (begin == end) {
    if (d_up) memset(d_up, 0, 4 * up_rows * s.width);
    if (d_down) memset(d_down, 0, 4 * s.hidden * s.width);
    return;
  }
  const int64_t block = block_rows(end - begin, buf.row());
  for (int64_t first = begin; first < end; first += block) {
    const int64_t rows = end - first < block ? end - first : block;
    const int64_t* sources = order.sources + first;
    const bool add = first > begin;
    gather(x, ldx, sources, s.choices, rows, s.width, buf.xs, buf.ldx);
    gather(grad, ldgrad, sources, s.choices, rows, s.width, buf.dy, buf.ldx);
    for (int64_t r = 0; r < rows; r++)
      memcpy(buf.h + r * buf.ldu, kept + (first + r) * up_rows, 4 * up_rows);
    gemm(rows, s.hidden, s.width, buf.dy, buf.ldx, 1, down, s.hidden, buf.da, buf.ldh);
    for (int64_t r = 0; r < rows; r++)
      d_weights[sources[r]] =
          activate_backward(buf.h + r * buf.ldu, buf.da + r * buf.ldh, s.hidden, s.activation,
                            weights[sources[r]], buf.a + r * buf.ldh);
    if (d_down)
      gemm(s.width, s.hidden, rows, buf.dy, 1, buf.ldx, buf.a, buf.ldh, d_down, s.hidden, add);
    if (d_up)
      gemm(up_rows, s.width, rows, buf.h, 1, buf.ldu, buf.xs, buf.ldx, d_up, s.width, add);
    if (dxs)
      gemm(rows, s.width, up_rows, buf.h, buf.ldu, 1, up, s.width, dxs + first * s.width,
           s.width);
  }
}

// Order rows by expert, keeping the order of tokens: a counting sort.
void order_rows(Team& team, const int64_t* indices, int64_t* bounds, int64_t* sources,
                int64_t* places, int64_t rows, int64_t experts) {
  if (team.thread) return;
  for (int64_t e = 0; e <= experts; e++) bounds[e] = 0;
  for (int64_t i = 0; i < rows; i++) bounds[indices[i] + 1]++;
  for (int64_t e = 0; e < experts; e++) bounds[e + 1] += bounds[e];
  for (int64_t i = 0; i < rows; i++) {
    const int64_t row = bounds[indices[i]]++;
    sources[row] = i;
    places[i] = row;
  }
  for (int64_t e = experts; e > 0; e--) bounds[e] = bounds[e - 1];
  bounds[0] = 0;
}

// y [tokens, width]; `outputs` [rows, width] is scratch memory for the experts' results. A call
// with few rows passes scratch memory for the hidden `units` [rows, up_rows]; one with many passes
// null, and may pass `kept` for the backward pass.
template <class W>
void mixture(Team& team, const float* x, const float* weights, W up, W down, int64_t* bounds,
             int64_t* sources, int64_t* places, float* units, float* kept, float* outputs, float* y,
             int64_t tokens, int64_t choices, int64_t experts, int64_t width, int64_t hidden,
             int64_t activation, int64_t ldx, const Changes& changes = {}) {
  const Shape s{tokens, choices, experts, width, hidden, activation};
  const Order order{bounds, sources, places};
  if (units) forward_few(team, s, order, x, ldx, weights, up, down, changes, units, outputs, y);
  else forward_many(team, s, order, x, ldx, weights, up, down, changes, kept, outputs, y);
}

void forward(Team& team, const float* x, const float* weights, const float* up, const float* down,
             int64_t* bounds, int64_t* sources, int64_t* places, float* units, float* kept,
             float* outputs, float* y, int64_t tokens, int64_t choices, int64_t experts,
             int64_t width, int64_t hidden, int64_t activation, int64_t ldx) {
  mixture(team, x, weights, up, down, bounds, sources, places, units, kept, outputs, y, tokens,
          choices, experts, width, hidden, activation, ldx);
}

void forward_int8(Team& team, const float* x, const float* weights, const int8_t* up_codes,
                  const float* up_scales, const int8_t* down_codes, const float* down_scales,
                  int64_t* bounds, int64_t* sources, int64_t* places, float* units, float* kept,
                  float* outputs, float* y, int64_t tokens, int64_t choices, int64_t experts,
                  int64_t width, int64_t hidden, int64_t activation, int64_t ldx,
                  const float* up_A, const float* up_B, const float* down_A, const float* down_B,
                  int64_t up_rank, int64_t down_rank, float up_scale, float down_scale) {
  mixture(team, x, weights, Int8Rows{up_codes, up_scales}, Int8Rows{down_codes, down_scales},
          bounds, sources, places, units, kept, outputs, y, tokens, choices, experts, width, hidden,
          activation, ldx,
          {{up_A, up_B, up_rank, up_scale}, {down_A, down_B, down_rank, down_scale}});
}

void forward_fp8(Team& team, const float* x, const float* weights, const uint8_t* up_codes,
                 const float* up_scales, const uint8_t* down_codes, const float* down_scales,
                 int64_t* bounds, int64_t* sources, int64_t* places, float* units, float* kept,
                 float* outputs, float* y, int64_t tokens, int64_t choices, int64_t experts,
                 int64_t width, int64_t hidden, int64_t activation, int64_t ldx,
                 const float* up_A, const float* up_B, const float* down_A, const float* down_B,
                 int64_t up_rank, int64_t down_rank, float up_scale, float down_scale) {
  mixture(team, x, weights, FP8Rows{up_codes, up_scales}, FP8Rows{down_codes, down_scales}, bounds,
          sources, places, units, kept, outputs, y, tokens, choices, experts, width, hidden,
          activation, ldx,
          {{up_A, up_B, up_rank, up_scale}, {down_A, down_B, down_rank, down_scale}});
}

void forward_nvfp4(Team& team, const float* x, const float* weights, const uint8_t* up_codes,
                   const uint8_t* up_blocks, const float* up_scales, const uint8_t* down_codes,
                   const uint8_t* down_blocks, const float* down_scales, int64_t* bounds,
                   int64_t* sources, int64_t* places, float* units, float* kept, float* outputs,
                   float* y, int64_t tokens, int64_t choices, int64_t experts, int64_t width,
                   int64_t hidden, int64_t activation, int64_t ldx,
                   const float* up_A, const float* up_B, const float* down_A, const float* down_B,
                   int64_t up_rank, int64_t down_rank, float up_scale, float down_scale) {
  mixture(team, x, weights, NVFP4Rows{up_codes, up_blocks, up_scales},
          NVFP4Rows{down_codes, down_blocks, down_scales}, bounds, sources, places, units, kept,
          outputs, y, tokens, choices, experts, width, hidden, activation, ldx,
          {{up_A, up_B, up_rank, up_scale}, {down_A, down_B, down_rank, down_scale}});
}

// a [rows, hidden] = act(h), row by row.
void activate_rows(Team& team, const float* h, float* a, int64_t rows, int64_t hidden,
                   int64_t activation) {
  const int64_t wide = activation == SWIGLU ? 2 * hidden : hidden;
  const Range part = team.share(rows);
  for (int64_t r = part.first; r < part.last; r++)
    activate(h + r * wide, hidden, hidden, activation, 1.0f, a + r * hidden);
}
// Gradients, from what the forward pass kept; `dxs` [rows, width] is scratch memory for the
// gradients of single rows. dx and dxs, d_up, and d_down may be null.
template <class W>
void backward(const float* x, const float* weights, W up, W down, int64_t* bounds,
              int64_t* sources, int64_t* places, const float* kept, const float* grad, float* dxs,
              float* dx, float* d_weights, float* d_up, float* d_down, int64_t tokens,
              int64_t choices, int64_t experts, int64_t width, int64_t hidden, int64_t activation,
              int64_t ldx, int64_t ldgrad, int64_t threads) {
  const Shape s{tokens, choices, experts, width, hidden, activation};
  const Order order{bounds, sources, places};
  const int64_t up_rows = s.up_rows();
  parallel_region(threads, [&](Team& team) {
    BackwardBuffers buf(s);
    Scratch scratch(buf.floats());
    buf.take(scratch);
    for (int64_t e; (e = team.next()) < experts;)
      backward_expert(s, order, e, x, ldx, weights, from_row(up, e * up_rows, width),
                      from_row(down, e * width, hidden), kept, grad, ldgrad, dxs, d_weights,
                      d_up ? d_up + e * up_rows * width : nullptr,
                      d_down ? d_down + e * hidden * width : nullptr, buf);
    if (!dx) return;
    team.wait();
    const Range part = team.share(tokens);
    for (int64_t t = part.first; t < part.last; t++)
      combine(dxs, places, choices, width, {0, width}, t, dx);
  });
}
}  // namespace

PARALLEL_KERNEL(experts_order, order_rows)
PARALLEL_KERNEL(experts_forward, forward)
PARALLEL_KERNEL(experts_forward_int8, forward_int8)
PARALLEL_KERNEL(experts_forward_fp8, forward_fp8)
PARALLEL_KERNEL(experts_forward_nvfp4, forward_nvfp4)
PARALLEL_KERNEL(activate_forward, activate_rows)

extern "C" {

void experts_backward(const float* x, const float* weights, const float* up, const float* down,
                      int64_t* bounds, int64_t* sources, int64_t* places, const float* kept,
                      const float* grad, float* dxs, float* dx, float* d_weights, float* d_up,
                      float* d_down, int64_t tokens, int64_t choices, int64_t experts,
                      int64_t width, int64_t hidden, int64_t activation, int64_t ldx,
                      int64_t ldgrad, int64_t threads) {
  backward(x, weights, up, down, bounds, sources, places, kept, grad, dxs, dx, d_weights, d_up,
           d_down, tokens, choices, experts, width, hidden, activation, ldx, ldgrad, threads);
}

// Those of codes, which are frozen: a tile is decoded at a time, and no matrix.
void experts_backward_int8(const float* x, const float* weights, const int8_t* up_codes,
                           const float* up_scales, const int8_t* down_codes,
                           const float* down_scales, int64_t* bounds, int64_t* sources,
                           int64_t* places, const float* kept, const float* grad, float* dxs,
                           float* dx, float* d_weights, int64_t tokens, int64_t choices,
                           int64_t experts, int64_t width, int64_t hidden, int64_t activation,
                           int64_t ldx, int64_t ldgrad, int64_t threads) {
  backward(x, weights, Int8Rows{up_codes, up_scales}, Int8Rows{down_codes, down_scales}, bounds,
           sources, places, kept, grad, dxs, dx, d_weights, nullptr, nullptr, tokens, choices,
           experts, width, hidden, activation, ldx, ldgrad, threads);
}

void experts_backward_fp8(const float* x, const float* weights, const uint8_t* up_codes,
                          const float* up_scales, const uint8_t* down_codes,
                          const float* down_scales, int64_t* bounds, int64_t* sources,
                          int64_t* places, const float* kept, const float* grad, float* dxs,
                          float* dx, float* d_weights, int64_t tokens, int64_t choices,
                          int64_t experts, int64_t width, int64_t hidden, int64_t activation,
                          int64_t ldx, int64_t ldgrad, int64_t threads) {
  backward(x, weights, FP8Rows{up_codes, up_scales}, FP8Rows{down_codes, down_scales}, bounds,
           sources, places, kept, grad, dxs, dx, d_weights, nullptr, nullptr, tokens, choices,
           experts, width, hidden, activation, ldx, ldgrad, threads);
}

void experts_backward_nvfp4(const float* x, const float* weights, const uint8_t* up_codes,
                            const uint8_t* up_blocks, const float* up_scales,
                            const uint8_t* down_codes, const uint8_t* down_blocks,
                            const float* down_scales, int64_t* bounds, int64_t* sources,
                            int64_t* places, const float* kept, const float* grad, float* dxs,
                            float* dx, float* d_weights, int64_t tokens, int64_t choices,
                            int64_t experts, int64_t width, int64_t hidden, int64_t activation,
                            int64_t ldx, int64_t ldgrad, int64_t threads) {
  backward(x, weights, NVFP4Rows{up_codes, up_blocks, up_scales},
           NVFP4Rows{down_codes, down_blocks, down_scales}, bounds, sources, places, kept, grad,
           dxs, dx, d_weights, nullptr, nullptr, tokens, choices, experts, width, hidden,
           activation, ldx, ldgrad, threads);
}

// dh of act(h), from the gradient of its result and the kept tensor: h for SwiGLU, and the result
// for a squared ReLU, whose root is exactly relu(h).
void activate_backward_rows(const float* kept, const float* grad, float* dh, int64_t rows,
                            int64_t hidden, int64_t activation, int64_t threads) {
  parallel_region(rows * hidden > MIN_PARALLEL_WORK ? threads : 1, [&](Team& team) {
    const Range part = team.share(rows);
    if (activation == RELU2) {
      for (int64_t i = part.first * hidden; i < part.last * hidden; i++)
        dh[i] = 2.0f * std::sqrt(kept[i]) * grad[i];
      return;
    }
    const int64_t wide = 2 * hidden;
    Scratch unused(hidden);
    for (int64_t r = part.first; r < part.last; r++) {
      float* to = dh + r * wide;
      memcpy(to, kept + r * wide, 4 * wide);
      activate_backward(to, grad + r * hidden, hidden, activation, 1.0f, unused.take(0, 0));
    }
  });
}
}
