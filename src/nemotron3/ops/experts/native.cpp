// Routed experts: y_t = sum over choices i of w_ti down_i act(up_i x_t), and its gradients.
//
// Rows (a token's choices) are ordered by expert, and one thread does all of an expert: gather the
// tokens, first product, activation times the router's weight, second product, a block of rows at a
// time so that everything between the two products stays in the cache. A token's results are then
// added up in the order of its choices. No sum depends on threads, and none on how many tokens an
// expert has; only a call of few tokens, which rows.h serves, sums in another order than others.
#include "gemm.h"
#include "rows.h"
#include "scratch.h"

namespace {
constexpr int64_t BLOCK = 126;  // rows at a time: a multiple of every tile's
constexpr int64_t WORTH_THREADS = 1 << 14;  // elements below which a second thread costs more

enum Activation { RELU2, SWIGLU };

struct Shape {
  int64_t tokens, choices, experts, width, hidden;  // hidden: units of an expert
  int64_t activation;
  int64_t up_rows() const { return activation == SWIGLU ? 2 * hidden : hidden; }
};

// Rows in the order of their experts: where each expert's begin, and the (token, choice) of each.
struct Order {
  int64_t* bounds;   // [experts + 1]
  int64_t* sources;  // [rows]: token * choices + choice
  int64_t* places;   // [tokens * choices]: the row of each
};

void gather(const float* from, int64_t ld, const int64_t* sources, int64_t choices, int64_t rows,
            int64_t width, float* to, int64_t ld_to) {
  for (int64_t r = 0; r < rows; r++)
    memcpy(to + r * ld_to, from + sources[r] / choices * ld, 4 * width);
}

// to[t] = sum of a token's rows, in the order of its choices.
void combine(const float* rows, const int64_t* places, int64_t choices, int64_t width, int64_t t,
             float* to) {
  int64_t d = 0;
  for (; d < width; d += LANES) {
    const int64_t n = width - d < LANES ? width - d : LANES;
    vec total{};
    for (int64_t i = 0; i < choices; i++) {
      const float* row = rows + places[t * choices + i] * width + d;
      total += n == LANES ? load(row) : load_part(row, n);
    }
    if (n == LANES) store(to + t * width + d, total);
    else store_part(to + t * width + d, total, n);
  }
}

// a [hidden] = act(h) * weight. `a` may be `h`.
INLINE void activate(const float* h, int64_t hidden, int64_t activation, float weight, float* a) {
  for (int64_t j = 0; j < hidden; j += LANES) {
    const int64_t n = hidden - j < LANES ? hidden - j : LANES;
    const vec first = n == LANES ? load(h + j) : load_part(h + j, n);
    vec u;
    if (activation == RELU2) {
      // Not max(0, h): a NaN has to get through.
      u = first < 0.0f ? vec{} : first * first;
    } else {
      const float* value = h + hidden + j;
      u = first * sigmoid(first) * (n == LANES ? load(value) : load_part(value, n));
    }
    if (n == LANES) store(a + j, u * weight);
    else store_part(a + j, u * weight, n);
  }
}

// From h and da = dL/d(a): a = act(h) * weight, dh in the place of h, and dL/d(weight).
INLINE float activate_backward(float* h, const float* da, int64_t hidden, int64_t activation,
                               float weight, float* a) {
  vec total{};
  for (int64_t j = 0; j < hidden; j += LANES) {
    const int64_t n = hidden - j < LANES ? hidden - j : LANES;
    const auto read = [n](const float* p) { return n == LANES ? load(p) : load_part(p, n); };
    const auto write = [n](float* p, vec v) { n == LANES ? store(p, v) : store_part(p, v, n); };
    const vec first = read(h + j), grad = read(da + j);
    vec u;
    if (activation == RELU2) {
      const vec positive = first < 0.0f ? vec{} : first;
      u = positive * positive;
      write(h + j, 2.0f * positive * grad * weight);
    } else {
      const vec value = read(h + hidden + j), s = sigmoid(first), silu = first * s;
      u = silu * value;
      write(h + j, grad * weight * value * (s + silu * (1.0f - s)));
      write(h + hidden + j, grad * weight * silu);
    }
    total += u * grad;
    write(a + j, u * weight);
  }
  return sum(total);
}

// Room for a block of rows: the tokens, and what is between the two products.
struct ForwardRoom {
  int64_t ldx, ldh;
  float *up_turned, *down_turned, *xs, *h;
  static int64_t floats(const Shape& s, int64_t rows, bool turns) {
    const int64_t matrices = turns ? (s.up_rows() + s.hidden) * s.width : 0;
    return matrices + rows * (pitch(s.width) + pitch(s.up_rows()));
  }
  ForwardRoom(const Shape& s, int64_t rows, bool turns, Scratch& scratch)
      : ldx(pitch(s.width)), ldh(pitch(s.up_rows())) {
    up_turned = turns ? scratch.take(s.width, s.up_rows()) : nullptr;
    down_turned = turns ? scratch.take(s.hidden, s.width) : nullptr;
    xs = scratch.take(rows, ldx);
    h = scratch.take(rows, ldh);
  }
};

// Rows first, first + 1, ... of one expert, through both products. `few` reads the matrices as they
// lie; else they have been turned.
void forward_rows(const Shape& s, const Order& order, bool few, int64_t first, int64_t rows,
                  const float* x, int64_t ldx, const float* weights, const float* up,
                  const float* down, const ForwardRoom& room, float* outputs) {
  const int64_t *sources = order.sources + first, up_rows = s.up_rows();
  gather(x, ldx, sources, s.choices, rows, s.width, room.xs, room.ldx);
  if (few) few_rows(rows, room.xs, room.ldx, up, 0, up_rows, s.width, room.h, room.ldh);
  else gemm(rows, up_rows, s.width, room.xs, room.ldx, 1, room.up_turned, up_rows, room.h, room.ldh);
  for (int64_t r = 0; r < rows; r++) {
    float* h = room.h + r * room.ldh;
    activate(h, s.hidden, s.activation, weights[sources[r]], h);
  }
  float* to = outputs + first * s.width;
  if (few) few_rows(rows, room.h, room.ldh, down, 0, s.width, s.hidden, to, s.width);
  else gemm(rows, s.width, s.hidden, room.h, room.ldh, 1, room.down_turned, s.width, to, s.width);
}

void forward_expert(const Shape& s, const Order& order, bool few, int64_t expert, const float* x,
                    int64_t ldx, const float* weights, const float* up, const float* down,
                    const ForwardRoom& room, float* outputs) {
  const int64_t end = order.bounds[expert + 1];
  if (!few) {
    transpose(up, s.width, s.up_rows(), s.width, room.up_turned, s.up_rows());
    transpose(down, s.hidden, s.width, s.hidden, room.down_turned, s.width);
  }
  const int64_t block = few ? FEW_ROWS : BLOCK;
  for (int64_t first = order.bounds[expert]; first < end; first += block)
    forward_rows(s, order, few, first, end - first < block ? end - first : block, x, ldx, weights,
                 up, down, room, outputs);
}

struct BackwardRoom {
  int64_t ldx, ldu, ldh;
  float *up_turned, *xs, *dy, *h, *a, *da;
  static int64_t floats(const Shape& s) {
    return s.up_rows() * s.width +
           BLOCK * (2 * pitch(s.width) + pitch(s.up_rows()) + 2 * pitch(s.hidden));
  }
  BackwardRoom(const Shape& s, Scratch& scratch)
      : ldx(pitch(s.width)), ldu(pitch(s.up_rows())), ldh(pitch(s.hidden)) {
    up_turned = scratch.take(s.width, s.up_rows());
    xs = scratch.take(BLOCK, ldx);
    dy = scratch.take(BLOCK, ldx);
    h = scratch.take(BLOCK, ldu);
    a = scratch.take(BLOCK, ldh);
    da = scratch.take(BLOCK, ldh);
  }
};

void backward_expert(const Shape& s, const Order& order, int64_t expert, const float* x,
                     int64_t ldx, const float* weights, const float* up, const float* down,
                     const float* grad, int64_t ldgrad, float* dxs, float* d_weights, float* d_up,
                     float* d_down, const BackwardRoom& room) {
  const int64_t begin = order.bounds[expert], end = order.bounds[expert + 1];
  const int64_t up_rows = s.up_rows();
  if (begin == end) {
    if (d_up) memset(d_up, 0, 4 * up_rows * s.width);
    if (d_down) memset(d_down, 0, 4 * s.hidden * s.width);
    return;
  }
  transpose(up, s.width, up_rows, s.width, room.up_turned, up_rows);
  for (int64_t first = begin; first < end; first += BLOCK) {
    const int64_t rows = end - first < BLOCK ? end - first : BLOCK;
    const int64_t* sources = order.sources + first;
    const bool add = first > begin;
    gather(x, ldx, sources, s.choices, rows, s.width, room.xs, room.ldx);
    gather(grad, ldgrad, sources, s.choices, rows, s.width, room.dy, room.ldx);
    gemm(rows, up_rows, s.width, room.xs, room.ldx, 1, room.up_turned, up_rows, room.h, room.ldu);
    gemm(rows, s.hidden, s.width, room.dy, room.ldx, 1, down, s.hidden, room.da, room.ldh);
    for (int64_t r = 0; r < rows; r++)
      d_weights[sources[r]] =
          activate_backward(room.h + r * room.ldu, room.da + r * room.ldh, s.hidden, s.activation,
                            weights[sources[r]], room.a + r * room.ldh);
    if (d_down)
      gemm(s.width, s.hidden, rows, room.dy, 1, room.ldx, room.a, room.ldh, d_down, s.hidden, add);
    if (d_up)
      gemm(up_rows, s.width, rows, room.h, 1, room.ldu, room.xs, room.ldx, d_up, s.width, add);
    if (dxs)
      gemm(rows, s.width, up_rows, room.h, room.ldu, 1, up, s.width, dxs + first * s.width,
           s.width);
  }
}
}  // namespace

extern "C" {

// Order rows by expert, keeping the order of tokens: a counting sort.
void experts_order(const int64_t* indices, int64_t* bounds, int64_t* sources, int64_t* places,
                   int64_t rows, int64_t experts, int64_t) {
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

// y [tokens, width]; `outputs` [rows, width] is room for the experts' results.
void experts_forward(const float* x, const float* weights, const float* up, const float* down,
                     int64_t* bounds, int64_t* sources, int64_t* places, float* outputs, float* y,
                     int64_t tokens, int64_t choices, int64_t experts, int64_t width,
                     int64_t hidden, int64_t activation, int64_t ldx, int64_t threads) {
  const Shape s{tokens, choices, experts, width, hidden, activation};
  const Order order{bounds, sources, places};
  const bool few = tokens <= FEW_ROWS;
  const int64_t rows = few ? FEW_ROWS : BLOCK;
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(ForwardRoom::floats(s, rows, !few));
    const ForwardRoom room(s, rows, !few, scratch);
#pragma omp for schedule(dynamic)
    for (int64_t e = 0; e < experts; e++)
      if (bounds[e] < bounds[e + 1])
        forward_expert(s, order, few, e, x, ldx, weights, up + e * s.up_rows() * width,
                       down + e * hidden * width, room, outputs);
#pragma omp for
    for (int64_t t = 0; t < tokens; t++) combine(outputs, places, choices, width, t, y);
  }
}

// Gradients; `dxs` [rows, width] is room for those of single rows. dx with dxs, d_up and d_down may
// be null.
void experts_backward(const float* x, const float* weights, const float* up, const float* down,
                      int64_t* bounds, int64_t* sources, int64_t* places, const float* grad,
                      float* dxs, float* dx, float* d_weights, float* d_up, float* d_down,
                      int64_t tokens, int64_t choices, int64_t experts, int64_t width,
                      int64_t hidden, int64_t activation, int64_t ldx, int64_t ldgrad,
                      int64_t threads) {
  const Shape s{tokens, choices, experts, width, hidden, activation};
  const Order order{bounds, sources, places};
  const int64_t up_rows = s.up_rows();
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(BackwardRoom::floats(s));
    const BackwardRoom room(s, scratch);
#pragma omp for schedule(dynamic)
    for (int64_t e = 0; e < experts; e++)
      backward_expert(s, order, e, x, ldx, weights, up + e * up_rows * width,
                      down + e * hidden * width, grad, ldgrad, dxs, d_weights,
                      d_up ? d_up + e * up_rows * width : nullptr,
                      d_down ? d_down + e * hidden * width : nullptr, room);
    if (dx) {
#pragma omp for
      for (int64_t t = 0; t < tokens; t++) combine(dxs, places, choices, width, t, dx);
    }
  }
}

// a [rows, hidden] = act(h), row by row.
void activate_forward(const float* h, float* a, int64_t rows, int64_t hidden, int64_t activation,
                      int64_t threads) {
  const int64_t wide = activation == SWIGLU ? 2 * hidden : hidden;
#pragma omp parallel for num_threads(threads) if (rows * hidden > WORTH_THREADS)
  for (int64_t r = 0; r < rows; r++)
    activate(h + r * wide, hidden, activation, 1.0f, a + r * hidden);
}

// dh of act(h), given the gradient of its result.
void activate_backward_rows(const float* h, const float* grad, float* dh, int64_t rows,
                            int64_t hidden, int64_t activation, int64_t threads) {
  const int64_t wide = activation == SWIGLU ? 2 * hidden : hidden;
#pragma omp parallel num_threads(threads) if (rows * hidden > WORTH_THREADS)
  {
    float* unused = new float[hidden];
#pragma omp for
    for (int64_t r = 0; r < rows; r++) {
      float* to = dh + r * wide;
      memcpy(to, h + r * wide, 4 * wide);
      activate_backward(to, grad + r * hidden, hidden, activation, 1.0f, unused);
    }
    delete[] unused;
  }
}
}
