// What the kernels of routed experts share: the order of rows, their copies and sums, and the
// activation between the two products.
#pragma once
#include "bfloat16.h"
#include "team.h"

enum Activation { RELU2, SWIGLU };

struct Shape {
  int64_t tokens, choices, experts, width, hidden;  // hidden: hidden units of an expert
  int64_t activation;
  int64_t up_rows() const { return activation == SWIGLU ? 2 * hidden : hidden; }
};

// Rows in the order of their experts: each expert's first row, and each row's (token, choice).
struct Order {
  int64_t* bounds;   // [experts + 1]
  int64_t* sources;  // [rows]: token * choices + choice
  int64_t* places;   // [tokens * choices]: the row of each
};

// Rows of elements E, float or bfloat16.
template <class E>
static inline void gather(const E* from, int64_t ld, const int64_t* sources, int64_t choices,
                          int64_t rows, int64_t width, E* to, int64_t ld_to) {
  for (int64_t r = 0; r < rows; r++)
    memcpy(to + r * ld_to, from + sources[r] / choices * ld, sizeof(E) * width);
}

// to[t] = sum of token t's rows in the order of its choices, for a range of columns.
template <class E>
static inline void combine(const E* rows, const int64_t* places, int64_t choices, int64_t width,
                           Range columns, int64_t t, E* to) {
  for (int64_t d = columns.first; d < columns.last; d += LANES) {
    const int64_t n = columns.last - d < LANES ? columns.last - d : LANES;
    vec total{};
    for (int64_t i = 0; i < choices; i++) {
      const E* row = rows + places[t * choices + i] * width + d;
      total += n == LANES ? load(row) : load_part(row, n);
    }
    if (n == LANES) store(to + t * width + d, total);
    else store_part(to + t * width + d, total, n);
  }
}

// a [units] = act(h) * weight. `a` may be `h`; with SwiGLU the values are `hidden` elements after
// the gates.
template <class E>
INLINE void activate(const E* h, int64_t units, int64_t hidden, int64_t activation, float weight,
                     E* a) {
  for (int64_t j = 0; j < units; j += LANES) {
    const int64_t n = units - j < LANES ? units - j : LANES;
    const vec first = n == LANES ? load(h + j) : load_part(h + j, n);
    vec u;
    if (activation == RELU2) {
      // Not max(0, h), which would drop a NaN.
      u = first < 0.0f ? vec{} : first * first;
    } else {
      const E* value = h + hidden + j;
      u = first * sigmoid(first) * (n == LANES ? load(value) : load_part(value, n));
    }
    if (n == LANES) store(a + j, u * weight);
    else store_part(a + j, u * weight, n);
  }
}

// From h and da = dL/d(a): compute a = act(h) * weight, replace h by dh, and return dL/d(weight).
template <class E>
INLINE float activate_backward(E* h, const E* da, int64_t hidden, int64_t activation, float weight,
                               E* a) {
  vec total{};
  for (int64_t j = 0; j < hidden; j += LANES) {
    const int64_t n = hidden - j < LANES ? hidden - j : LANES;
    const auto read = [n](const E* p) { return n == LANES ? load(p) : load_part(p, n); };
    const auto write = [n](E* p, vec v) { n == LANES ? store(p, v) : store_part(p, v, n); };
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
