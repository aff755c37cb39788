// Routed experts whose products have operands rounded to NVFP4 (experts/quantized.py defines them).
//
// As in native.cpp one thread does all work of an expert. Tensor scales are those of an expert's
// tokens, so all its rows are gathered before the first is rounded, and every operand is rounded
// just before its product, while it is in the cache. The matrices are rounded by the caller.
#include <cmath>

#include "experts.h"
#include "by_error.h"
#include "gemm.h"
#include "ms_eden.h"
#include "scratch.h"

namespace {
constexpr int64_t BLOCK = nvfp4::BLOCK;
constexpr int64_t PADDING = (int64_t)1 << 31;  // place of the first row of zeros (product.py)

constexpr int64_t whole(int64_t rows) { return (rows + BLOCK - 1) / BLOCK * BLOCK; }

int64_t most_rows_of(const Order& order, int64_t experts) {
  int64_t most = 0;
  for (int64_t e = 0; e < experts; e++) {
    const int64_t rows = order.bounds[e + 1] - order.bounds[e];
    most = rows > most ? rows : most;
  }
  return whole(most);
}

// Number of zeros, to count how many values become zero.
int64_t zeros(const float* x, int64_t rows, int64_t d, int64_t ld) {
  int64_t found = 0;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < d; i++) found += x[r * ld + i] == 0.0f;
  return found;
}

// Operands whose flushed values are counted apart: the number, and the number of all values.
enum Operand { UP_FPROP, DOWN_FPROP, DOWN_DGRAD, DOWN_WGRAD, UP_DGRAD, UP_WGRAD };

void count(int64_t* counts, Operand operand, int64_t flushed, int64_t all) {
  __atomic_fetch_add(counts + 2 * operand, flushed, __ATOMIC_RELAXED);
  __atomic_fetch_add(counts + 2 * operand + 1, all, __ATOMIC_RELAXED);
}

// How an operand is rounded (native_quantized.py).
enum Format { NONE, NEAREST, STOCHASTIC, MS_EDEN, FOUR_OVER_SIX };

// Rounding of the operands of one expert, in place.
struct Rounding {
  Format format;
  const int64_t *places, *features;  // of rows and of columns in the noise
  const float* signs;                // of the Hadamard transform, or null
  Random rotation;                   // the signs of MS-EDEN
  int64_t* counts;                   // of flushed values, or null

  // Blocks along rows.
  void rows(Operand operand, float* x, int64_t rows, int64_t d, int64_t ld,
            const Random& noise) const {
    Barrier barrier;
    Team alone(0, 1, barrier);
    float amax = 0;
    if (format == MS_EDEN) {
      const nvfp4::Rotation by(d, rotation);
      nvfp4::rotate_rows(alone, x, by, x, &amax, rows, rows, d, ld, false);
      nvfp4::ms_eden_rows(alone, x, &amax, by.size, rows, rows, d, ld, places, 0, noise);
      if (counts) count(counts, operand, zeros(x, rows, d, ld), rows * d);
      return;
    }
    const int64_t before = counts ? zeros(x, rows, d, ld) : 0;
    nvfp4::find_amax(alone, x, &amax, rows, rows, d, ld);
    const nvfp4::Output out{nullptr, nullptr, x};
    const auto run = [&](auto body) {
      body(alone, x, &amax, out, rows, rows, d, ld, places, 0, noise);
    };
    if (format == FOUR_OVER_SIX)
      nvfp4::by_error<nvfp4::FourOrSix>(alone, x, &amax, out, rows, rows, d, ld);
    else if (format == STOCHASTIC) run(nvfp4::along_rows<1, true>);
    else run(nvfp4::along_rows<1, false>);
    if (counts) count(counts, operand, zeros(x, rows, d, ld) - before, rows * d);
  }

  // Blocks along columns, of rows that are padded with zeros to whole blocks: `own` of them are
  // not padding.
  void columns(Operand operand, float* x, int64_t rows, int64_t own, int64_t d, int64_t ld,
               const Random& noise) const {
    Barrier barrier;
    Team alone(0, 1, barrier);
    float amax = 0;
    if (format == MS_EDEN) {
      const nvfp4::Rotation by(rows, rotation);
      nvfp4::rotate_columns(alone, x, by, x, &amax, rows, rows, d, ld, false);
      nvfp4::ms_eden_columns(alone, x, &amax, by.size, rows, rows, d, ld, features, 0, noise);
      if (counts) count(counts, operand, zeros(x, rows, d, ld), rows * d);
      return;
    }
    if (signs) nvfp4::transform(alone, x, signs, x, &amax, rows, rows, d, ld, false, false);
    else nvfp4::find_amax(alone, x, &amax, rows, rows, d, ld);
    const int64_t before = counts ? zeros(x, rows, d, ld) : 0;
    const nvfp4::Output out{nullptr, nullptr, x};
    const auto run = [&](auto body) {
      body(alone, x, &amax, out, rows, rows, d, ld, places, 0, noise);
    };
    if (format == STOCHASTIC) run(nvfp4::along_columns<true>);
    else run(nvfp4::along_columns<false>);
    if (counts)
      count(counts, operand, zeros(x, rows, d, ld) - before, (signs ? rows : own) * d);
  }
};

// C = A W^T, in blocks of rows that stay in the cache.
void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda,
             const float* w, float* c, int64_t ldc) {
  const int64_t block = block_rows(rows, depth + columns);
  for (int64_t r = 0; r < rows; r += block)
    gemm_turned(rows - r < block ? rows - r : block, columns, depth, a + r * lda, lda, 1, w, depth,
                c + r * ldc, ldc);
}

// C = A W, likewise.
void turned_product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda,
                    const float* w, float* c, int64_t ldc) {
  const int64_t block = block_rows(rows, depth + columns);
  for (int64_t r = 0; r < rows; r += block)
    gemm(rows - r < block ? rows - r : block, columns, depth, a + r * lda, lda, 1, w, columns,
         c + r * ldc, ldc);
}

// C [n, m] = A^T B over all rows, likewise.
void sum_over_rows(int64_t rows, int64_t n, int64_t m, const float* a, int64_t lda, const float* b,
                   int64_t ldb, float* c) {
  const int64_t block = block_rows(rows, n + m);
  for (int64_t r = 0; r < rows; r += block)
    gemm(n, m, rows - r < block ? rows - r : block, a + r * lda, 1, lda, b + r * ldb, ldb, c, m,
         r > 0);
}

void forward_expert(const Shape& s, const Order& order, int64_t expert, const float* x, int64_t ldx,
                    const float* weights, const float* up, const float* down, float* xs,
                    int64_t ldxs, float* h, int64_t ldh, float* kept, float* outputs,
                    const Rounding& rounding) {
  const int64_t begin = order.bounds[expert], rows = order.bounds[expert + 1] - begin;
  const int64_t up_rows = s.up_rows();
  const int64_t* sources = order.sources + begin;
  gather(x, ldx, sources, s.choices, rows, s.width, xs, ldxs);
  if (rounding.format) rounding.rows(UP_FPROP, xs, rows, s.width, ldxs, {});
  product(rows, up_rows, s.width, xs, ldxs, up, h, ldh);
  for (int64_t r = 0; r < rows; r++) {
    float* unit = h + r * ldh;
    if (kept) memcpy(kept + (begin + r) * up_rows, unit, 4 * up_rows);
    activate(unit, s.hidden, s.hidden, s.activation, weights[sources[r]], unit);
  }
  if (rounding.format) rounding.rows(DOWN_FPROP, h, rows, s.hidden, ldh, {});
  product(rows, s.width, s.hidden, h, ldh, down, outputs + begin * s.width, s.width);
}

// y [tokens, width]; matrices have the values that fprop multiplies with. `kept` [rows, up_rows] is
// for the backward pass, or null.
void forward(Team& team, const float* x, const float* weights, const float* up, const float* down,
             int64_t* bounds, int64_t* sources, int64_t* places, float* kept, float* outputs,
             float* y, int64_t* counts, int64_t tokens, int64_t choices, int64_t experts, int64_t width,
             int64_t hidden, int64_t activation, int64_t ldx, int64_t format) {
  const Shape s{tokens, choices, experts, width, hidden, activation};
  const Order order{bounds, sources, places};
  const Rounding rounding{(Format)format, nullptr, nullptr, nullptr, {}, counts};
  const int64_t most = most_rows_of(order, experts), up_rows = s.up_rows();
  const int64_t ldxs = pitch(width), ldh = pitch(up_rows);
  Scratch scratch(most * (ldxs + ldh));
  float *xs = scratch.take(most, ldxs), *h = scratch.take(most, ldh);
  for (int64_t e; (e = team.next()) < experts;)
    if (order.bounds[e] < order.bounds[e + 1])
      forward_expert(s, order, e, x, ldx, weights, up + e * up_rows * width,
                     down + e * hidden * width, xs, ldxs, h, ldh, kept, outputs, rounding);
  team.wait();
  const Range part = team.share(tokens);
  for (int64_t t = part.first; t < part.last; t++)
    combine(outputs, places, choices, width, {0, width}, t, y);
}

// What the backward pass rounds of the products with one matrix, and how.
struct Backward {
  Format dgrad, wgrad;  // of gradients
  const float* signs;   // of the Hadamard transform, or null
  Random dgrad_signs, dgrad_dy, wgrad_signs, wgrad_dy, wgrad_x;
  int64_t first_place;
  const int64_t* features;
  int64_t* counts;
};

struct Buffers {
  int64_t ldx, ldu, ldh, ldt;
  float *xs, *dy, *h, *a, *da, *t;
  int64_t* places;
  int64_t floats(int64_t rows) const { return rows * (2 * ldx + ldu + 2 * ldh + ldt + 2); }
  explicit Buffers(const Shape& s)
      : ldx(pitch(s.width)), ldu(pitch(s.up_rows())), ldh(pitch(s.hidden)),
        ldt(ldx > ldu ? ldx : ldu) {}
  void take(Scratch& scratch, int64_t rows) {
    xs = scratch.take(rows, ldx);
    dy = scratch.take(rows, ldx);
    h = scratch.take(rows, ldu);
    a = scratch.take(rows, ldh);
    da = scratch.take(rows, ldh);
    t = scratch.take(rows, ldt);
    places = (int64_t*)scratch.take(rows, 2);
  }
};

void backward_expert(const Shape& s, const Order& order, int64_t expert, const float* x,
                     int64_t ldx, const float* weights, const float* up, const float* down,
                     const float* kept, const float* grad, int64_t ldgrad, float* dxs,
                     float* d_weights, float* d_up, float* d_down, const Backward& of_down,
                     const Backward& of_up, const Buffers& buf) {
  const int64_t begin = order.bounds[expert], rows = order.bounds[expert + 1] - begin;
  const int64_t up_rows = s.up_rows(), padded = of_up.wgrad ? whole(rows) : rows;
  if (!rows) {
    if (d_up) memset(d_up, 0, 4 * up_rows * s.width);
    if (d_down) memset(d_down, 0, 4 * s.hidden * s.width);
    return;
  }
  const int64_t* sources = order.sources + begin;
  for (int64_t r = 0; r < whole(rows); r++)
    buf.places[r] = r < rows ? of_up.first_place + sources[r] : PADDING + r - rows;
  // Copies of the operands of dgrad: those of wgrad are rounded apart.
  const auto dgrad = [&](Operand operand, const float* dy, int64_t ld, int64_t d,
                         const Backward& how) {
    if (!how.dgrad) return std::make_pair(dy, ld);
    for (int64_t r = 0; r < rows; r++) memcpy(buf.t + r * buf.ldt, dy + r * ld, 4 * d);
    const Rounding rounding{how.dgrad, buf.places, how.features, nullptr, how.dgrad_signs,
                            how.counts};
    rounding.rows(operand, buf.t, rows, d, buf.ldt, how.dgrad_dy);
    return std::make_pair((const float*)buf.t, buf.ldt);
  };
  const auto wgrad = [&](Operand operand, float* dy, int64_t ld_dy, int64_t n, float* b,
                         int64_t ldb, int64_t m, const Backward& how, float* dw) {
    if (how.wgrad) {
      for (int64_t r = rows; r < padded; r++) {
        memset(dy + r * ld_dy, 0, 4 * n);
        memset(b + r * ldb, 0, 4 * m);
      }
      Rounding rounding{how.wgrad,       buf.places, how.features, how.signs,
                        how.wgrad_signs, how.counts};
      rounding.columns(operand, dy, padded, rows, n, ld_dy, how.wgrad_dy);
      if (how.wgrad == STOCHASTIC) rounding.format = NEAREST;
      rounding.columns(operand, b, padded, rows, m, ldb, how.wgrad_x);
    }
    sum_over_rows(padded, n, m, dy, ld_dy, b, ldb, dw);
  };

  gather(grad, ldgrad, sources, s.choices, rows, s.width, buf.dy, buf.ldx);
  const auto dy = dgrad(DOWN_DGRAD, buf.dy, buf.ldx, s.width, of_down);
  turned_product(rows, s.hidden, s.width, dy.first, dy.second, down, buf.da, buf.ldh);
  for (int64_t r = 0; r < rows; r++) {
    memcpy(buf.h + r * buf.ldu, kept + (begin + r) * up_rows, 4 * up_rows);
    d_weights[sources[r]] =
        activate_backward(buf.h + r * buf.ldu, buf.da + r * buf.ldh, s.hidden, s.activation,
                          weights[sources[r]], buf.a + r * buf.ldh);
  }
  if (d_down)
    wgrad(DOWN_WGRAD, buf.dy, buf.ldx, s.width, buf.a, buf.ldh, s.hidden, of_down, d_down);
  if (dxs) {
    const auto dh = dgrad(UP_DGRAD, buf.h, buf.ldu, up_rows, of_up);
    turned_product(rows, s.width, up_rows, dh.first, dh.second, up, dxs + begin * s.width, s.width);
  }
  if (d_up) {
    gather(x, ldx, sources, s.choices, rows, s.width, buf.xs, buf.ldx);
    wgrad(UP_WGRAD, buf.h, buf.ldu, up_rows, buf.xs, buf.ldx, s.width, of_up, d_up);
  }
}
}  // namespace

PARALLEL_KERNEL(experts_quantized_forward, forward)

extern "C" {

// As experts_backward of native.cpp. Matrices have the values that dgrad multiplies with. `signs`
// are of the Hadamard transform, or null; `noise` are seed and stream of the signs and the gradients
// of dgrad, and of the signs and both operands of wgrad, of the second product and then of the
// first; `features` are 0, 1, ... for as many columns as there are; `counts` of flushed values are
// added to, or null.
void experts_quantized_backward(const float* x, const float* weights, const float* up,
                                const float* down, int64_t* bounds, int64_t* sources,
                                int64_t* places, const float* kept, const float* grad, float* dxs,
                                float* dx, float* d_weights, float* d_up, float* d_down,
                                const float* signs, const int64_t* noise, const int64_t* features,
                                int64_t* counts, int64_t tokens, int64_t choices, int64_t experts,
                                int64_t width, int64_t hidden, int64_t activation, int64_t ldx,
                                int64_t ldgrad, int64_t dgrad, int64_t wgrad, int64_t rounds,
                                int64_t first_place, int64_t threads) {
  const Shape s{tokens, choices, experts, width, hidden, activation};
  const Order order{bounds, sources, places};
  const int64_t up_rows = s.up_rows(), most = most_rows_of(order, experts);
  const auto random = [&](int i) {
    return Random{(uint32_t)noise[2 * i], (uint32_t)noise[2 * i + 1], rounds};
  };
  const auto backward = [&](int first) {
    return Backward{(Format)dgrad,     (Format)wgrad,     signs,
                    random(first),     random(first + 1), random(first + 2),
                    random(first + 3), random(first + 4), first_place,
                    features,          counts};
  };
  const Backward of_down = backward(0), of_up = backward(5);
  parallel_region(threads, [&](Team& team) {
    Buffers buf(s);
    Scratch scratch(buf.floats(most));
    buf.take(scratch, most);
    for (int64_t e; (e = team.next()) < experts;)
      backward_expert(s, order, e, x, ldx, weights, up + e * up_rows * width,
                      down + e * hidden * width, kept, grad, ldgrad, dxs, d_weights,
                      d_up ? d_up + e * up_rows * width : nullptr,
                      d_down ? d_down + e * hidden * width : nullptr, of_down, of_up, buf);
    if (!dx) return;
    team.wait();
    const Range part = team.share(tokens);
    for (int64_t t = part.first; t < part.last; t++)
      combine(dxs, places, choices, width, {0, width}, t, dx);
  });
}
}
