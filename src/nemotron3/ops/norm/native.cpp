// Both norms and their gradients, each in one pass over memory: a row is read twice because of the
// mean, the second time from the cache. The plain norm is the gated one without a gate and with one
// group.
//
// The backward pass recomputes the scale of a row. Rows are cut into spans, and the spans' parts of
// the weight's gradient are added in order, so no bit depends on the number of threads; a row's
// results depend on that row only.
//
// Numbers of type X are float or bfloat16, the weight of type W likewise; all between is float32.
#include <cmath>
#include <memory>

#include "bfloat16.h"
#include "team.h"

namespace {
constexpr int64_t SPAN = 64;
constexpr int64_t MIN_PARALLEL_WORK = 1 << 14;  // elements below which a second thread costs more

template <class X>
INLINE vec read(const X* p, int64_t n) { return n >= LANES ? load(p) : load_part(p, n); }
template <class X>
INLINE void write(X* p, vec v, int64_t n) { n >= LANES ? store(p, v) : store_part(p, v, n); }

struct Shape {
  int64_t rows, width, groups;
  float eps;
  int64_t group() const { return width / groups; }
};

// u = x SiLU(gate) of one group, kept in `u`; returns (mean(u^2) + eps)^(-1/2).
template <bool GATED, class X>
float scale_of(const Shape& s, const X* x, const X* gate, float* u) {
  vec total{};
  for (int64_t i = 0; i < s.group(); i += LANES) {
    const int64_t n = s.group() - i;
    vec value = read(x + i, n);
    if (GATED) {
      const vec g = read(gate + i, n);
      value *= g * sigmoid(g);
      write(u + i, value, n);
    }
    total += value * value;
  }
  return 1.0f / std::sqrt(sum(total) / s.group() + s.eps);
}

// `u` is scratch for a group.
template <bool GATED, class X, class W>
void norm_row(const Shape& s, const X* x, const X* gate, const W* weight, X* y, float* u) {
  for (int64_t at = 0; at < s.width; at += s.group()) {
    const float scale = scale_of<GATED>(s, x + at, gate + at, u);
    const auto normed = [&](auto values) {
      for (int64_t i = 0; i < s.group(); i += LANES) {
        const int64_t n = s.group() - i;
        write(y + at + i, read(weight + at + i, n) * (read(values + i, n) * scale), n);
      }
    };
    if constexpr (GATED) normed(u);
    else normed(x + at);
  }
}

// With n = u r and g = w dy: du = r (g - n mean(g n)), dx = du SiLU(gate) and, with the sigmoid s,
// dgate = du x s (1 + gate (1 - s)). dw = dy n is added to `d_weight`. `u` is scratch for a group.
template <bool GATED, class X, class W>
void norm_row_back(const Shape& s, const X* x, const X* gate, const W* weight, const X* dy, X* dx,
                   X* d_gate, float* d_weight, float* u) {
  for (int64_t at = 0; at < s.width; at += s.group()) {
    const float scale = scale_of<GATED>(s, x + at, gate + at, u);
    const auto values = [&] {
      if constexpr (GATED) return (const float*)u;
      else return x + at;
    }();
    vec total{};
    for (int64_t i = 0; i < s.group(); i += LANES) {
      const int64_t n = s.group() - i;
      const vec change = read(dy + at + i, n) * (read(values + i, n) * scale);
      total += read(weight + at + i, n) * change;
      write(d_weight + at + i, read(d_weight + at + i, n) + change, n);
    }
    const float mean = sum(total) / s.group();
    for (int64_t i = 0; i < s.group(); i += LANES) {
      const int64_t n = s.group() - i;
      const vec g = read(weight + at + i, n) * read(dy + at + i, n);
      vec du = scale * (g - read(values + i, n) * (scale * mean));
      if (GATED) {
        const vec z = read(gate + at + i, n), sigma = sigmoid(z);
        const vec d = du * read(x + at + i, n) * sigma * (1.0f + z * (1.0f - sigma));
        write(d_gate + at + i, d, n);
        du *= z * sigma;
      }
      write(dx + at + i, du, n);
    }
  }
}

// y [rows, width] = weight * normed; gate may be null.
template <class X, class W>
void forward(Team& team, const X* x, const X* gate, const W* weight, X* y, int64_t rows,
             int64_t width, int64_t groups, int64_t ldx, int64_t ldgate, float eps) {
  const Shape s{rows, width, groups, eps};
  const auto run = gate ? norm_row<true, X, W> : norm_row<false, X, W>;
  const std::unique_ptr<float[]> u(new float[s.group()]);
  const Range part = team.share(rows);
  for (int64_t r = part.first; r < part.last; r++)
    run(s, x + r * ldx, gate ? gate + r * ldgate : x, weight, y + r * width, u.get());
}

// dx and dgate [rows, width], dw [width]; gate and dgate may be null.
template <class X, class W>
void backward(const X* x, const X* gate, const W* weight, const X* dy, X* dx, X* d_gate,
              float* d_weight, int64_t rows, int64_t width, int64_t groups, int64_t ldx,
              int64_t ldgate, int64_t lddy, float eps, int64_t threads) {
  const Shape s{rows, width, groups, eps};
  const auto run = gate ? norm_row_back<true, X, W> : norm_row_back<false, X, W>;
  const int64_t spans = (rows + SPAN - 1) / SPAN;
  const std::unique_ptr<float[]> parts(new float[spans * width]);
  parallel_region(rows * width > MIN_PARALLEL_WORK ? threads : 1, [&](Team& team) {
    const std::unique_ptr<float[]> u(new float[s.group()]);
    const Range share = team.share(spans);
    for (int64_t k = share.first; k < share.last; k++) {
      float* part = parts.get() + k * width;
      memset(part, 0, 4 * width);
      for (int64_t r = k * SPAN; r < rows && r < (k + 1) * SPAN; r++)
        run(s, x + r * ldx, gate ? gate + r * ldgate : x, weight, dy + r * lddy, dx + r * width,
            gate ? d_gate + r * width : dx, part, u.get());
    }
  });
  memset(d_weight, 0, 4 * width);
  for (int64_t k = 0; k < spans; k++)
    for (int64_t i = 0; i < width; i++) d_weight[i] += parts[k * width + i];
}
}  // namespace

#define NORM(X, W)                                                                               \
  PARALLEL_KERNEL(norm_forward_##X##_##W, (forward<X, W>))                                       \
  extern "C" void norm_backward_##X##_##W(                                                       \
      const X* x, const X* gate, const W* weight, const X* dy, X* dx, X* d_gate,                 \
      float* d_weight, int64_t rows, int64_t width, int64_t groups, int64_t ldx, int64_t ldgate, \
      int64_t lddy, float eps, int64_t threads) {                                                \
    backward(x, gate, weight, dy, dx, d_gate, d_weight, rows, width, groups, ldx, ldgate, lddy,  \
             eps, threads);                                                                      \
  }
typedef float float32;
NORM(float32, float32)
NORM(bfloat16, bfloat16)
NORM(bfloat16, float32)
