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
//
// Activations have elements E, float or bfloat16. The latter are multiplied with plain numbers
// (gemm_bfloat16.h); what is between two products is rounded to bfloat16 too. Weights of the router
// and gradients of matrices are float32 in both cases.
#include <cmath>

#include "experts.h"
#include "gemm_bfloat16.h"
#include "int8_activations.h"
#include "low_rank.h"
#include "packed.h"
#include "rows.h"
#include "scratch.h"
#include "team.h"

namespace {
constexpr int64_t MIN_PARALLEL_WORK = 1 << 14;  // elements below which a second thread costs more

// Whether matrices may have low-rank changes: they stand beside codes, whose products are float32.
template <class E>
constexpr bool CAN_CHANGE = std::is_same_v<E, float>;

// Low-rank changes of both matrices of the experts.
struct Changes {
  LowRank up, down;
  int64_t rank() const { return up.rank > down.rank ? up.rank : down.rank; }
  Changes of(const Shape& s, int64_t expert) const {
    return {of_expert(up, expert, s.up_rows(), s.width),
            of_expert(down, expert, s.width, s.hidden)};
  }
};

// The width of a row of elements in floats, by which blocks of rows are chosen.
template <class E>
constexpr int64_t floats_of(int64_t elements) {
  return elements * sizeof(E) / sizeof(float);
}

// Scratch memory for a block of rows: the tokens, the values between the products, and those
// between the two factors of a change.
template <class E>
struct ForwardBuffers {
  int64_t ldx, ldh, rank;
  E *xs, *h;
  float* narrow;
  int64_t row() const { return floats_of<E>(ldx + ldh); }
  int64_t floats() const { return most_rows(row()) * (row() + rank); }
  ForwardBuffers(const Shape& s, int64_t rank)
      : ldx(pitch_of<E>(s.width)), ldh(pitch_of<E>(s.up_rows())), rank(rank) {}
  void take(Scratch& scratch) {
    xs = scratch.take_as<E>(most_rows(row()), ldx);
    h = scratch.take_as<E>(most_rows(row()), ldh);
    narrow = scratch.take(most_rows(row()), rank);
  }
};

// All rows of one expert, by one thread. The results of the first product are written to `kept`
// [rows, up_rows] if it is not null.
template <class E, class Matrix>
void forward_expert(const Shape& s, const Order& order, int64_t expert, const E* x, int64_t ldx,
                    const float* weights, Matrix up, Matrix down, const Changes& changes,
                    const ForwardBuffers<E>& buf, E* kept, E* outputs) {
  const int64_t begin = order.bounds[expert], end = order.bounds[expert + 1];
  const int64_t up_rows = s.up_rows(), block = block_rows(end - begin, buf.row());
  for (int64_t first = begin; first < end; first += block) {
    const int64_t rows = end - first < block ? end - first : block;
    const int64_t* sources = order.sources + first;
    gather(x, ldx, sources, s.choices, rows, s.width, buf.xs, buf.ldx);
    gemm_turned(rows, up_rows, s.width, buf.xs, buf.ldx, 1, up, s.width, buf.h, buf.ldh, false,
                down);
    if constexpr (CAN_CHANGE<E>)
      if (changes.up.A) {
        narrow_rows(rows, s.width, buf.xs, buf.ldx, changes.up, buf.narrow);
        add_change(rows, 0, up_rows, buf.narrow, changes.up, buf.h, buf.ldh);
      }
    for (int64_t r = 0; r < rows; r++) {
      E* h = buf.h + r * buf.ldh;
      if (kept) memcpy(kept + (first + r) * up_rows, h, sizeof(E) * up_rows);
      activate(h, s.hidden, s.hidden, s.activation, weights[sources[r]], h);
    }
    gemm_turned(rows, s.width, s.hidden, buf.h, buf.ldh, 1, down, s.hidden,
                outputs + first * s.width, s.width);
    if constexpr (CAN_CHANGE<E>)
      if (changes.down.A) {
        narrow_rows(rows, s.hidden, buf.h, buf.ldh, changes.down, buf.narrow);
        add_change(rows, 0, s.width, buf.narrow, changes.down, outputs + first * s.width, s.width);
      }
  }
}

// Few rows for each expert: the time goes into reading the matrices, so every thread reads a part
// of each. `units` [rows, up_rows] is scratch memory for the values between the products.
template <class E, class Matrix>
void forward_few(Team& team, const Shape& s, const Order& order, const E* x, int64_t ldx,
                 const float* weights, const Matrix* up, const Matrix* down,
                 const Changes& changes, E* units, E* outputs, E* y) {
  const int64_t up_rows = s.up_rows();
  const Range hidden = team.share(s.hidden, LANES), columns = team.share(s.width, LANES);
  const int64_t most = s.tokens * s.choices;  // of one expert: a token may choose it twice
  const int64_t ldxs = pitch_of<E>(s.width);
  Scratch scratch(most * (floats_of<E>(ldxs) + changes.rank()));
  E* xs = scratch.take_as<E>(most, ldxs);
  float* narrow = scratch.take(most, changes.rank());  // every thread computes the few numbers
  for (int64_t e = 0; e < s.experts; e++) {
    const int64_t first = order.bounds[e], rows = order.bounds[e + 1] - first;
    if (rows == 0) continue;
    const int64_t* sources = order.sources + first;
    gather(x, ldx, sources, s.choices, rows, s.width, xs, ldxs);
    E* h = units + first * up_rows;
    for (int64_t at = 0; at < up_rows; at += s.hidden)
      few_rows(rows, xs, ldxs, up[e], at + hidden.first, at + hidden.last, s.width, h, up_rows);
    if constexpr (CAN_CHANGE<E>)
      if (const LowRank change = changes.of(s, e).up; change.A) {
        narrow_rows(rows, s.width, xs, ldxs, change, narrow);
        for (int64_t at = 0; at < up_rows; at += s.hidden)
          add_change(rows, at + hidden.first, at + hidden.last, narrow, change, h, up_rows);
      }
    for (int64_t r = 0; r < rows; r++) {
      E* part = h + r * up_rows + hidden.first;
      activate(part, hidden.last - hidden.first, s.hidden, s.activation, weights[sources[r]], part);
    }
  }
  team.wait();
  for (int64_t e = 0; e < s.experts; e++) {
    const int64_t first = order.bounds[e], rows = order.bounds[e + 1] - first;
    if (rows == 0) continue;
    const E* h = units + first * up_rows;
    few_rows(rows, h, up_rows, down[e], columns.first, columns.last, s.hidden,
             outputs + first * s.width, s.width);
    if constexpr (CAN_CHANGE<E>)
      if (const LowRank change = changes.of(s, e).down; change.A) {
        narrow_rows(rows, s.hidden, h, up_rows, change, narrow);
        add_change(rows, columns.first, columns.last, narrow, change, outputs + first * s.width,
                   s.width);
      }
  }
  for (int64_t t = 0; t < s.tokens; t++)
    combine(outputs, order.places, s.choices, s.width, columns, t, y);
}

template <class E, class Matrix>
void forward_many(Team& team, const Shape& s, const Order& order, const E* x, int64_t ldx,
                  const float* weights, const Matrix* up, const Matrix* down,
                  const Changes& changes, E* kept, E* outputs, E* y) {
  ForwardBuffers<E> buf(s, changes.rank());
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

template <class E>
struct BackwardBuffers {
  int64_t ldx, ldu, ldh;
  E *xs, *dy, *h, *a, *da;
  int64_t row() const { return floats_of<E>(2 * ldx + ldu + 2 * ldh); }
  int64_t floats() const { return most_rows(row()) * row(); }
  explicit BackwardBuffers(const Shape& s)
      : ldx(pitch_of<E>(s.width)), ldu(pitch_of<E>(s.up_rows())), ldh(pitch_of<E>(s.hidden)) {}
  void take(Scratch& scratch) {
    const int64_t rows = most_rows(row());
    xs = scratch.take_as<E>(rows, ldx);
    dy = scratch.take_as<E>(rows, ldx);
    h = scratch.take_as<E>(rows, ldu);
    a = scratch.take_as<E>(rows, ldh);
    da = scratch.take_as<E>(rows, ldh);
  }
};

template <class E, class Matrix>
void backward_expert(const Shape& s, const Order& order, int64_t expert, const E* x, int64_t ldx,
                     const float* weights, Matrix up, Matrix down, const E* kept, const E* grad,
                     int64_t ldgrad, E* dxs, float* d_weights, float* d_up, float* d_down,
                     const BackwardBuffers<E>& buf) {
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
      memcpy(buf.h + r * buf.ldu, kept + (first + r) * up_rows, sizeof(E) * up_rows);
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
template <class E, class Matrix>
void forward(Team& team, const E* x, const float* weights, const Matrix* up, const Matrix* down,
             int64_t* bounds, int64_t* sources, int64_t* places, E* units, E* kept, E* outputs,
             E* y, const float* up_A, const float* up_B, const float* down_A, const float* down_B,
             int64_t tokens, int64_t choices, int64_t experts, int64_t width, int64_t hidden,
             int64_t activation, int64_t ldx, int64_t up_rank, int64_t down_rank, float up_scale,
             float down_scale) {
  const Shape s{tokens, choices, experts, width, hidden, activation};
  const Order order{bounds, sources, places};
  const Changes changes{{up_A, up_B, up_rank, up_scale}, {down_A, down_B, down_rank, down_scale}};
  if (units) forward_few(team, s, order, x, ldx, weights, up, down, changes, units, outputs, y);
  else forward_many(team, s, order, x, ldx, weights, up, down, changes, kept, outputs, y);
}

// a [rows, hidden] = act(h), row by row.
template <class E>
void activate_rows(Team& team, const E* h, E* a, int64_t rows, int64_t hidden,
                   int64_t activation) {
  const int64_t wide = activation == SWIGLU ? 2 * hidden : hidden;
  const Range part = team.share(rows);
  for (int64_t r = part.first; r < part.last; r++)
    activate(h + r * wide, hidden, hidden, activation, 1.0f, a + r * hidden);
}

// Gradients, from what the forward pass kept; `dxs` [rows, width] is scratch memory for the
// gradients of single rows. dx and dxs, d_up, and d_down may be null; codes, of which a tile is
// decoded at a time, are frozen.
template <class E, class Matrix>
void backward(Team& team, const E* x, const float* weights, const Matrix* up, const Matrix* down,
              int64_t* bounds, int64_t* sources, int64_t* places, const E* kept, const E* grad,
              E* dxs, E* dx, float* d_weights, float* d_up, float* d_down, int64_t tokens, int64_t choices, int64_t experts,
              int64_t width, int64_t hidden, int64_t activation, int64_t ldx, int64_t ldgrad) {
  const Shape s{tokens, choices, experts, width, hidden, activation};
  const Order order{bounds, sources, places};
  BackwardBuffers<E> buf(s);
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
PARALLEL_KERNEL(experts_forward_float32, (forward<float, const float*>))
PARALLEL_KERNEL(experts_forward_bfloat16, (forward<float, const bfloat16*>))
PARALLEL_KERNEL(experts_forward_int8, (forward<float, Int8Rows>))
PARALLEL_KERNEL(experts_forward_fp8, (forward<float, FP8Rows>))
PARALLEL_KERNEL(experts_forward_nvfp4, (forward<float, NVFP4Rows>))
PARALLEL_KERNEL(experts_forward_int8_int8, (forward<float, Int8Activations<Int8Rows>>))
PARALLEL_KERNEL(experts_forward_nvfp4_int8, (forward<float, Int8Activations<NVFP4Rows>>))
PARALLEL_KERNEL(experts_forward_of_bfloat16_float32, (forward<bfloat16, const float*>))
PARALLEL_KERNEL(experts_forward_of_bfloat16_bfloat16, (forward<bfloat16, const bfloat16*>))
PARALLEL_KERNEL(experts_backward_float32, (backward<float, const float*>))
PARALLEL_KERNEL(experts_backward_int8, (backward<float, Int8Rows>))
PARALLEL_KERNEL(experts_backward_fp8, (backward<float, FP8Rows>))
PARALLEL_KERNEL(experts_backward_nvfp4, (backward<float, NVFP4Rows>))
PARALLEL_KERNEL(experts_backward_of_bfloat16_float32, (backward<bfloat16, const float*>))
PARALLEL_KERNEL(experts_backward_of_bfloat16_bfloat16, (backward<bfloat16, const bfloat16*>))
PARALLEL_KERNEL(activate_forward_float32, activate_rows<float>)
PARALLEL_KERNEL(activate_forward_bfloat16, activate_rows<bfloat16>)

namespace {
// dh of act(h), from the gradient of its result and the kept tensor: h for SwiGLU, and the result
// for a squared ReLU, whose root is exactly relu(h).
template <class E>
void activate_backward_rows(const E* kept, const E* grad, E* dh, int64_t rows, int64_t hidden,
                            int64_t activation, int64_t threads) {
  parallel_region(rows * hidden > MIN_PARALLEL_WORK ? threads : 1, [&](Team& team) {
    const Range part = team.share(rows);
    if (activation == RELU2) {
      for (int64_t i = part.first * hidden; i < part.last * hidden; i++)
        put(dh + i, 2.0f * std::sqrt(number(kept[i])) * number(grad[i]));
      return;
    }
    const int64_t wide = 2 * hidden;
    Scratch unused(pitch(hidden));
    for (int64_t r = part.first; r < part.last; r++) {
      E* to = dh + r * wide;
      memcpy(to, kept + r * wide, sizeof(E) * wide);
      activate_backward(to, grad + r * hidden, hidden, activation, 1.0f,
                        unused.take_as<E>(0, 0));
    }
  });
}
}  // namespace

extern "C" {
void activate_backward_float32(const float* kept, const float* grad, float* dh, int64_t rows,
                               int64_t hidden, int64_t activation, int64_t threads) {
  activate_backward_rows(kept, grad, dh, rows, hidden, activation, threads);
}
void activate_backward_bfloat16(const bfloat16* kept, const bfloat16* grad, bfloat16* dh,
                                int64_t rows, int64_t hidden, int64_t activation,
                                int64_t threads) {
  activate_backward_rows(kept, grad, dh, rows, hidden, activation, threads);
}
}
