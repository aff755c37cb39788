// The causal convolution with SiLU, and its gradients, each in one pass over memory.
//
// A task is a span of one segment's tokens. It handles all channels of a few tokens at a time, so
// that memory is read in order and the previous rows that the taps need are still in the cache. The
// backward pass recomputes the convolution, which costs a few multiply-adds and saves a stored
// tensor. It goes over a span from its last token to its first and keeps the gradients of the
// preactivations that taps reach; it recomputes those of the tokens after its span. Spans depend on
// their own segment only, and their parts of the weight's gradient are added in order, so no bit
// depends on the number of threads or on other segments.
#include <memory>
#include <vector>

#include "bfloat16.h"
#include "team.h"

namespace {
constexpr int64_t SPAN = 32, SPAN_BACK = 128;  // longer backward: each adds a part of dW
constexpr int64_t GROUP = 4;                   // tokens that share what is loaded
constexpr int64_t MIN_PARALLEL_WORK = 1 << 14;  // elements below which a second thread costs more

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
template <class X>
INLINE vec read(const X* p, int64_t n) { return n >= LANES ? load(p) : load_part(p, n); }
template <class X>
INLINE void write(X* p, vec v, int64_t n) { n >= LANES ? store(p, v) : store_part(p, v, n); }

// X is float or bfloat16, of which only the memory consists; weights are float32.
template <class X>
struct Conv {
  const X *x, *conv_states;
  int64_t taps, channels, ldx;
  int64_t pitch;               // distance of rows of scratch: whole vectors
  std::vector<float> weights;  // [taps, pitch], then the bias

  Conv(const X* x, const float* weight, const float* bias, const X* conv_states, int64_t taps,
       int64_t channels, int64_t ldx)
      : x(x), conv_states(conv_states), taps(taps), channels(channels), ldx(ldx),
        pitch((channels + LANES - 1) / LANES * LANES), weights((taps + 1) * pitch) {
    transpose(weight, taps, channels, taps, weights.data(), pitch);
    if (bias) memcpy(weights.data() + taps * pitch, bias, 4 * channels);
  }

  // The input at a position of a segment; negative positions are in the state.
  const X* input(int64_t segment, int64_t first, int64_t position) const {
    if (position >= 0) return x + (first + position) * ldx;
    return conv_states + (segment * (taps - 1) + taps - 1 + position) * channels;
  }
};

struct Span {
  int64_t segment;
  int64_t first, length;  // of the segment
  int64_t begin, end;     // positions in it
};

std::vector<Span> spans_of(const int64_t* bounds, int64_t segments, int64_t size) {
  std::vector<Span> spans;
  for (int64_t i = 0; i < segments; i++) {
    const int64_t length = bounds[i + 1] - bounds[i];
    for (int64_t at = 0; at < length; at += size)
      spans.push_back({i, bounds[i], length, at, smaller(at + size, length)});
  }
  return spans;
}

// TAPS is the number of taps, or 0 if only known at run time.
template <int TAPS, class X>
INLINE vec preactivation(const Conv<X>& c, const X* const* rows, int64_t channel, int64_t n) {
  const float* weights = c.weights.data() + channel;
  const int64_t taps = TAPS ? TAPS : c.taps;
  vec z = load(weights + taps * c.pitch);
#pragma GCC unroll 4
  for (int64_t j = 0; j < taps; j++) z += load(weights + j * c.pitch) * read(rows[j] + channel, n);
  return z;
}

// COUNT tokens at a time: each weight and each input is loaded once for all of them.
template <int TAPS, int COUNT, class X>
void convolve_some(const Conv<X>& c, const X* const* rows, X* to) {
  for (int64_t i = 0; i < c.channels; i += LANES) {
    const int64_t n = c.channels - i;
#pragma GCC unroll 4
    for (int64_t k = 0; k < COUNT; k++) {
      const vec z = preactivation<TAPS>(c, rows + k, i, n);
      write(to + k * c.channels + i, z * sigmoid(z), n);
    }
  }
}

template <int TAPS, class X>
void convolve(const Conv<X>& c, const Span& span, X* y) {
  const int64_t taps = TAPS ? TAPS : c.taps;
  std::vector<const X*> rows(taps + GROUP - 1);
  for (int64_t t = span.begin; t < span.end;) {
    const int64_t count = t + GROUP <= span.end ? GROUP : 1;
    for (int64_t j = 0; j < taps + count - 1; j++)
      rows[j] = c.input(span.segment, span.first, t - taps + 1 + j);
    X* to = y + (span.first + t) * c.channels;
    (count == GROUP ? convolve_some<TAPS, GROUP, X> : convolve_some<TAPS, 1, X>)(c, rows.data(), to);
    t += count;
  }
}

template <class X>
struct Gradients {
  const X *dy, *d_new_conv_states;
  int64_t lddy;
  X *dx, *d_conv_states;
};

// COUNT consecutive tokens of the backward pass. Rows and dy are null where there is no token:
// before a segment, whose inputs are in the state. `added` may contain null.
template <int COUNT, class X>
struct Some {
  const X* const* rows;  // inputs, from the first that the first token's taps reach
  const X* dy[COUNT];
  const X* added[COUNT];
  X* dx[COUNT];  // all null if not needed
};

// Compute dz = dy SiLU'(z) of each token, and add its part of the gradients of weight and bias to
// `parts` (laid out as `Conv::weights`) if not null. Compute dx from these dz and from `later`
// [taps - 1, pitch], the dz of the taps - 1 tokens after them, which is replaced by the dz of the
// first tokens.
template <int TAPS, int COUNT, class X>
void convolve_back_some(const Conv<X>& c, const Some<COUNT, X>& some, float* later, float* parts) {
  const int64_t taps = TAPS ? TAPS : c.taps;
  for (int64_t i = 0; i < c.channels; i += LANES) {
    const int64_t n = c.channels - i;
    vec dz[COUNT]{};
    if (some.rows)
#pragma GCC unroll 4
      for (int64_t k = 0; k < COUNT; k++) {
        const vec z = preactivation<TAPS>(c, some.rows + k, i, n), s = sigmoid(z);
        dz[k] = read(some.dy[k] + i, n) * s * (1.0f + z * (1.0f - s));
      }
    if (parts) {
      float* part = parts + i;
#pragma GCC unroll 4
      for (int64_t j = 0; j < taps; j++, part += c.pitch) {
        vec sum = load(part);
#pragma GCC unroll 4
        for (int64_t k = 0; k < COUNT; k++) sum += dz[k] * read(some.rows[k + j] + i, n);
        store(part, sum);
      }
      vec sum = load(part);
#pragma GCC unroll 4
      for (int64_t k = 0; k < COUNT; k++) sum += dz[k];
      store(part, sum);
    }
    const auto at = [&](int64_t k) {
      return k < COUNT ? dz[k] : load(later + (k - COUNT) * c.pitch + i);
    };
    if (some.dx[0])
#pragma GCC unroll 4
      for (int64_t k = 0; k < COUNT; k++) {
        vec d = some.added[k] ? read(some.added[k] + i, n) : vec{};
#pragma GCC unroll 4
        for (int64_t j = 0; j < taps; j++)
          d += load(c.weights.data() + (taps - 1 - j) * c.pitch + i) * at(k + j);
        write(some.dx[k] + i, d, n);
      }
#pragma GCC unroll 4
    for (int64_t m = taps - 2; m >= 0; m--) store(later + m * c.pitch + i, at(m));
  }
}

template <int TAPS, int COUNT, class X>
void convolve_back_at(const Conv<X>& c, const Gradients<X>& g, const Span& span, int64_t t, float* later,
                      float* parts) {
  const int64_t before = (TAPS ? TAPS : c.taps) - 1;
  std::vector<const X*> rows(before + COUNT);
  Some<COUNT, X> some{t < 0 ? nullptr : rows.data(), {}, {}, {}};
  for (int64_t j = 0; j < before + COUNT && t >= 0; j++)
    rows[j] = c.input(span.segment, span.first, t - before + j);
  for (int64_t k = 0; k < COUNT; k++) {
    const int64_t at = t + k, state_row = at - (span.length - before);  // row of the new conv_state
    if (t >= 0) some.dy[k] = g.dy + (span.first + at) * g.lddy;
    if (at >= span.end) continue;
    if (g.d_new_conv_states && state_row >= 0)
      some.added[k] = g.d_new_conv_states + (span.segment * before + state_row) * c.channels;
    if (t >= 0 && g.dx) some.dx[k] = g.dx + (span.first + at) * c.channels;
    if (t < 0 && g.d_conv_states)
      some.dx[k] = g.d_conv_states + (span.segment * before + before + at) * c.channels;
  }
  convolve_back_some<TAPS, COUNT>(c, some, later, t >= 0 && t < span.end ? parts : nullptr);
}

template <int TAPS, class X>
void convolve_back(const Conv<X>& c, const Gradients<X>& g, const Span& span, float* parts) {
  const int64_t before = (TAPS ? TAPS : c.taps) - 1;
  std::vector<float> later(before * c.pitch);  // zero after the segment
  int64_t t = smaller(span.end + before, span.length);
  while (t > span.end) convolve_back_at<TAPS, 1>(c, g, span, --t, later.data(), parts);
  while (t - GROUP >= span.begin) {
    t -= GROUP;
    convolve_back_at<TAPS, GROUP>(c, g, span, t, later.data(), parts);
  }
  const int64_t start = span.begin ? span.begin : -before;
  while (t > start) convolve_back_at<TAPS, 1>(c, g, span, --t, later.data(), parts);
}

// Sum the parts [taps + 1, pitch] of all spans in order, to dw [channels, taps] and db [channels].
template <class X>
void add_parts(const Conv<X>& c, const float* parts, int64_t spans, float* dw, float* db) {
  const int64_t size = (c.taps + 1) * c.pitch;
  std::vector<float> total(parts, parts + size);
  for (int64_t k = 1; k < spans; k++)
    for (int64_t i = 0; i < size; i += LANES)
      store(&total[i], load(&total[i]) + load(parts + k * size + i));
  transpose(total.data(), c.pitch, c.taps, c.channels, dw, c.taps);
  if (db) memcpy(db, &total[c.taps * c.pitch], 4 * c.channels);
}

// y [tokens, channels] and new_conv_states [segments, taps - 1, channels]; bias may be null.
template <class X>
void forward(const X* x, const float* weight, const float* bias, const X* conv_states,
             const int64_t* bounds, X* y, X* new_conv_states, int64_t segments, int64_t taps,
             int64_t channels, int64_t ldx, int64_t threads) {
  const Conv<X> c(x, weight, bias, conv_states, taps, channels, ldx);
  const std::vector<Span> spans = spans_of(bounds, segments, SPAN);
  const auto run = taps == 4 ? convolve<4, X> : convolve<0, X>;
  parallel_region(bounds[segments] * channels > MIN_PARALLEL_WORK ? threads : 1, [&](Team& team) {
    for (int64_t i; (i = team.next()) < (int64_t)spans.size();) run(c, spans[i], y);
  });
  for (int64_t s = 0; s < segments; s++)
    for (int64_t r = 0; r < taps - 1; r++)
      memcpy(new_conv_states + (s * (taps - 1) + r) * channels,
             c.input(s, bounds[s], bounds[s + 1] - bounds[s] - (taps - 1) + r), sizeof(X) * channels);
}

// Gradients from those of y and of the new states (which may be null): dx [tokens, channels],
// dw [channels, taps], db [channels], d_conv_states [segments, taps - 1, channels]. dx, db and
// d_conv_states may be null.
template <class X>
void backward(const X* x, const float* weight, const float* bias, const X* conv_states,
              const int64_t* bounds, const X* dy, const X* d_new_conv_states, X* dx, float* dw,
              float* db, X* d_conv_states, int64_t segments, int64_t taps, int64_t channels,
              int64_t ldx, int64_t lddy, int64_t threads) {
  const Conv<X> c(x, weight, bias, conv_states, taps, channels, ldx);
  const Gradients<X> g{dy, d_new_conv_states, lddy, dx, d_conv_states};
  const std::vector<Span> spans = spans_of(bounds, segments, SPAN_BACK);
  const auto run = taps == 4 ? convolve_back<4, X> : convolve_back<0, X>;
  const int64_t size = (taps + 1) * c.pitch;
  const std::unique_ptr<float[]> parts(new float[spans.size() * size]);
  parallel_region(bounds[segments] * channels > MIN_PARALLEL_WORK ? threads : 1, [&](Team& team) {
    for (int64_t i; (i = team.next()) < (int64_t)spans.size();) {
      memset(parts.get() + i * size, 0, 4 * size);
      run(c, g, spans[i], parts.get() + i * size);
    }
  });
  add_parts(c, parts.get(), spans.size(), dw, db);
}
}  // namespace

#define CONV(X)                                                                                   \
  void conv_forward_##X(const X* x, const float* weight, const float* bias, const X* conv_states, \
                        const int64_t* bounds, X* y, X* new_conv_states, int64_t segments,        \
                        int64_t taps, int64_t channels, int64_t ldx, int64_t threads) {           \
    forward(x, weight, bias, conv_states, bounds, y, new_conv_states, segments, taps, channels,   \
            ldx, threads);                                                                        \
  }                                                                                               \
  void conv_backward_##X(const X* x, const float* weight, const float* bias,                      \
                         const X* conv_states, const int64_t* bounds, const X* dy,                \
                         const X* d_new_conv_states, X* dx, float* dw, float* db,                 \
                         X* d_conv_states, int64_t segments, int64_t taps, int64_t channels,      \
                         int64_t ldx, int64_t lddy, int64_t threads) {                            \
    backward(x, weight, bias, conv_states, bounds, dy, d_new_conv_states, dx, dw, db,             \
             d_conv_states, segments, taps, channels, ldx, lddy, threads);                        \
  }
typedef float float32;
extern "C" {
CONV(float32)
CONV(bfloat16)
}
