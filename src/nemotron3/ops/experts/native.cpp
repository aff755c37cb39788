// Routed experts: y_t = sum over choices i of w_ti down_i act(up_i x_t), and its gradients.
//
// Rows (a token's choices) are ordered by expert, and one thread does all work of an expert: gather
// the tokens, first product, activation times the router's weight, second product. It handles a
// block of rows at a time, so that the values between the two products stay in the cache. A token's
// results are then added in the order of its choices. No sum depends on the number of threads or on
// how many tokens an expert has, except that a call with few rows per expert, which uses rows.h,
// sums in another order than a call with many.
//
// The matrices of an expert may be anywhere: in a stack, or pages of a mapped file. Kernels take a
// table of Matrix, one for each expert, which is what weights.h calls a weight: the place of plain
// numbers, or those of codes and scales.
#include <cmath>

#include "experts.h"
#include "gemm.h"
#include "int8_activations.h"
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
template <class Matrix>
void forward_expert(const Shape& s, const Order& order, int64_t expert, const float* x,
                    int64_t ldx, const float* weights, Matrix up, Matrix down,
                    const Changes& changes, const ForwardBuffers& buf, float* kept,
                    float* outputs) {
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
template <class Matrix>
void forward_few(Team& team, const Shape& s, const Order& order, const float* x, int64_t ldx,
                 const float* weights, const Matrix* up, const Matrix* down,
                 const Changes& changes, float* units, float* outputs, float* y) {
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
    float* h = units + first * up_rows;
    for (int64_t at = 0; at < up_rows; at += s.hidden)
      few_rows(rows, xs, s.width, up[e], at + hidden.first, at + hidden.last, s.width, h, up_rows);
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
    few_rows(rows, h, up_rows, down[e], columns.first, columns.last, s.hidden,
             outputs + first * s.width, s.width);
    if (const LowRank change = changes.of(s, e).down; change.A) {
      narrow_rows(rows, s.hidden, h, up_rows, change, narrow);
      add_change(rows, columns.first, columns.last, narrow, change, outputs + first * s.width,
                 s.width);
    }
  }
  for (int64_t t = 0; t < s.tokens; t++)
    combine(outputs, order.places, s.choices, s.width, columns, t, y);
}

template <class Matrix>
void forward_many(Team& team, const Shape& s, const Order& order, const float* x, int64_t ldx,
                  const float* weights, const Matrix* up, const Matrix* down,
                  const Changes& changes, float* kept, float* outputs, float* y) {
  ForwardBuffers buf(s, changes.rank());
  Scratch scratch(buf.floats());
  buf.take(scratch);
  for (int64_t e; (e = team.next()) < s.experts;)
    if (order.bounds[e] < order.bounds[e + 1])
      forward_expert(s, order, e, x, ldx, weights, up[e], down[e], changes.of(s, e), buf, kept,
                     outputs);
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

template <class Matrix>
void backward_expert(const Shape& s, const Order& order, int64_t expert, const float* x,
                     int64_t ldx, const float* weights, Matrix up, Matrix down, const float* kept, const float* grad, int64_t ldgrad, float* dxs,
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
// null, and may pass `kept` for the backward pass. A and B are stacks, or null without a change.
template <class Matrix>
void forward(Team& team, const float* x, const float* weights, const Matrix* up,
             const Matrix* down, int64_t* bounds, int64_t* sources, int64_t* places, float* units,
             float* kept, float* outputs, float* y, const float* up_A, const float* up_B,
             const float* down_A, const float* down_B, int64_t tokens, int64_t choices,
             int64_t experts, int64_t width, int64_t hidden, int64_t activation, int64_t ldx,
             int64_t up_rank, int64_t down_rank, float up_scale, float down_scale) {
  const Shape s{tokens, choices, experts, width, hidden, activation};
  const Order order{bounds, sources, places};
  const Changes changes{{up_A, up_B, up_rank, up_scale}, {down_A, down_B, down_rank, down_scale}};
  if (units) forward_few(team, s, order, x, ldx, weights, up, down, changes, units, outputs, y);
  else forward_many(team, s, order, x, ldx, weights, up, down, changes, kept, outputs, y);
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
// gradients of single rows. dx and dxs, d_up, and d_down may be null; codes, of which a tile is
// decoded at a time, are frozen.
template <class Matrix>
void backward(Team& team, const float* x, const float* weights, const Matrix* up,
              const Matrix* down, int64_t* bounds, int64_t* sources, int64_t* places,
              const float* kept, const float* grad, float* dxs, float* dx, float* d_weights,
              float* d_up, float* d_down, int64_t tokens, int64_t choices, int64_t experts,
              int64_t width, int64_t hidden, int64_t activation, int64_t ldx, int64_t ldgrad) {
  const Shape s{tokens, choices, experts, width, hidden, activation};
  const Order order{bounds, sources, places};
  BackwardBuffers buf(s);
  Scratch scratch(buf.floats());
  buf.take(scratch);
  for (int64_t e; (e = team.next()) < experts;)
    backward_expert(s, order, e, x, ldx, weights, up[e], down[e], kept, grad, ldgrad, dxs,
                    d_weights, d_up ? d_up + e * s.up_rows() * width : nullptr,
                    d_down ? d_down + e * hidden * width : nullptr, buf);
  team.wait();
  if (!dx) return;
  const Range part = team.share(tokens);
  for (int64_t t = part.first; t < part.last; t++)
    combine(dxs, places, choices, width, {0, width}, t, dx);
}
}  // namespace

PARALLEL_KERNEL(experts_order, order_rows)
PARALLEL_KERNEL(experts_forward_float32, forward<const float*>)
PARALLEL_KERNEL(experts_forward_bfloat16, forward<const bfloat16*>)
PARALLEL_KERNEL(experts_forward_int8, forward<Int8Rows>)
PARALLEL_KERNEL(experts_forward_fp8, forward<FP8Rows>)
PARALLEL_KERNEL(experts_forward_nvfp4, forward<NVFP4Rows>)
PARALLEL_KERNEL(experts_forward_int8_int8, forward<Int8Activations<Int8Rows>>)
PARALLEL_KERNEL(experts_forward_nvfp4_int8, forward<Int8Activations<NVFP4Rows>>)
PARALLEL_KERNEL(experts_backward_float32, backward<const float*>)
PARALLEL_KERNEL(experts_backward_int8, backward<Int8Rows>)
PARALLEL_KERNEL(experts_backward_fp8, backward<FP8Rows>)
PARALLEL_KERNEL(experts_backward_nvfp4, backward<NVFP4Rows>)
PARALLEL_KERNEL(activate_forward, activate_rows)

extern "C" {

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
