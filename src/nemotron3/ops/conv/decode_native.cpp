// The convolution with SiLU for a few tokens that continue states in a pool.
//
// A thread handles whole vectors of channels and goes over each sequence with them: the previous
// inputs that the taps need stay in registers. Taps are summed in the order of native.cpp, so both
// give the same bits.
#include "bfloat16.h"
#include "team.h"

namespace {
constexpr int64_t MAX_TAPS = 64;

struct Shape {
  int64_t rows, length, taps, channels, ldx, ld_intermediate;
};

template <class X>
INLINE vec read(const X* p, int64_t n) { return n >= LANES ? load(p) : load_part(p, n); }
template <class X>
INLINE void write(X* p, vec v, int64_t n) { n >= LANES ? store(p, v) : store_part(p, v, n); }

// Channels c, c + 1, ... of every row. TAPS is the number of taps, or 0 if only known at run time.
template <int TAPS, class X, class W, class S>
void convolve(const Shape& s, int64_t c, const X* x, const W* weight, const W* bias,
              S* conv_states, const int64_t* slots, S* intermediate, X* y) {
  const int64_t taps = TAPS ? TAPS : s.taps, n = s.channels - c < LANES ? s.channels - c : LANES;
  constexpr int ROOM = TAPS ? TAPS : MAX_TAPS;
  float turned[ROOM][LANES];
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < taps; j++) turned[j][i] = number(weight[(c + i) * taps + j]);
  vec weights[ROOM], seen[ROOM];
  for (int64_t j = 0; j < taps; j++) weights[j] = load(turned[j]);
  const vec start = bias ? read(bias + c, n) : vec{};
  const auto keep = [&](S* conv_state) {
    for (int64_t j = 0; j + 1 < taps; j++) write(conv_state + j * s.channels + c, seen[j], n);
  };
  for (int64_t r = 0; r < s.rows; r++) {
    S* conv_state = conv_states + slots[r] * (taps - 1) * s.channels;
    for (int64_t j = 0; j + 1 < taps; j++) seen[j] = read(conv_state + j * s.channels + c, n);
    for (int64_t t = 0; t < s.length; t++) {
      const int64_t token = r * s.length + t;
      seen[taps - 1] = read(x + token * s.ldx + c, n);
      vec z = start;
      for (int64_t j = 0; j < taps; j++) z += weights[j] * seen[j];
      write(y + token * s.channels + c, z * sigmoid(z), n);
      for (int64_t j = 0; j + 1 < taps; j++) seen[j] = seen[j + 1];
      if (intermediate) keep(intermediate + r * s.ld_intermediate + t * (taps - 1) * s.channels);
    }
    if (!intermediate) keep(conv_state);
  }
}

// Elements of x and y, of weight and bias, and of states have types of their own.
// y [rows * length, channels]; x has rows of ldx elements, weight is [channels, taps], bias may be
// null. Sequence r continues from conv_states[slots[r]] [taps - 1, channels], which is updated in
// place unless there is `intermediate` [rows, length, taps - 1, channels], whose rows are
// ld_intermediate elements apart: it then gets the state after each token.
template <class X, class W, class S>
void steps(Team& team, const X* x, const W* weight, const W* bias, S* conv_states,
           const int64_t* slots, S* intermediate, X* y, int64_t rows, int64_t length, int64_t taps,
           int64_t channels, int64_t ldx, int64_t ld_intermediate) {
  const Shape s{rows, length, taps, channels, ldx, ld_intermediate};
  const auto run = taps == 4 ? convolve<4, X, W, S> : convolve<0, X, W, S>;
  const Range part = team.share(channels, LANES);
  for (int64_t c = part.first; c < part.last; c += LANES)
    run(s, c, x, weight, bias, conv_states, slots, intermediate, y);
}
}  // namespace

#define STEPS(X, W, S) PARALLEL_KERNEL(conv_steps_##X##_##W##_##S, (steps<X, W, S>))
typedef float float32;
STEPS(float32, float32, float32)
STEPS(float32, float32, bfloat16)
STEPS(bfloat16, float32, float32)
STEPS(bfloat16, float32, bfloat16)
STEPS(bfloat16, bfloat16, float32)
STEPS(bfloat16, bfloat16, bfloat16)
