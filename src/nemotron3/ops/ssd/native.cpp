// The state-space scan in chunks (see chunked.py for the mathematics), its gradients, and the
// recurrence for a few tokens.
//
// One thread does all of a unit: a segment, a group and a block of the heads that share it. It
// walks the segment's chunks with the carried state in its cache, and everything of a chunk
// (operands, scores, decayed scores) stays there too. Chunks are shorter than on other backends:
// what is quadratic in their length then costs little, so the matrix of decays is formed for each
// head, and nothing has to be scaled by factors that may overflow.
//
// Operands of a chunk are copied into rows that lie close together: rows of the projection that x,
// B and C are slices of are often a power of two apart, and would all fall into a few lines of the
// cache. Units are cut by shapes alone, and a segment's never see another's, so no bit depends on
// threads or neighbours.
#include <cstdlib>

#include "gemm.h"
#include "rows.h"

namespace {
constexpr int64_t CHUNK = 48;  // tokens: whole tiles, and whole vectors
constexpr int64_t BLOCK = 256;  // columns of a block of heads: so much state stays in the cache
constexpr int64_t WORTH_THREADS = 1 << 17;  // elements of states, times tokens, from which a second
                                            // thread saves more than it costs
constexpr int STEP_ROWS = LANES < 8 ? LANES : 8;  // whose sums are in flight together
constexpr float GENTLE = 40.0f;  // log decay of a chunk up to which factors are exact and finite
constexpr float GONE = -80.0f;  // what has decayed further is zero, not a denormal number

// Floats in a row of scratch: whole cache lines, an odd number of them, so that equal columns of
// consecutive rows fall into different sets of the cache.
constexpr int64_t pitch(int64_t n) { return ((n + 15) / 16 | 1) * 16; }
constexpr int64_t SQUARE = pitch(CHUNK);  // of a row of scores

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE vec decayed(vec log_decay) { return log_decay < GONE ? vec{} : exp(log_decay); }

// Memory of one thread, handed out a piece at a time.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : memory((float*)std::aligned_alloc(64, (4 * floats + 63) / 64 * 64)), next(memory) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(memory); }
  float* take(int64_t rows, int64_t ld) {
    float* piece = next;
    next += rows * ld;
    return piece;
  }

 private:
  float *memory, *next;
};

struct Shape {
  int64_t heads, head_dim, groups, d_state;
  int64_t per_group() const { return heads / groups; }
  // Heads of a block. Where there is one group, it is cut in two, to have work for two threads.
  int64_t block() const {
    const int64_t fit = BLOCK / head_dim > 1 ? BLOCK / head_dim : 1;
    const int64_t most = groups == 1 ? (heads + 1) / 2 : per_group();
    return smaller(fit, most);
  }
  int64_t blocks() const { return (per_group() + block() - 1) / block(); }
};

struct Operands {
  const float *x, *dt, *A, *B, *C, *D, *initial;
  int64_t ldx, lddt, ldB, ldC;
};

// What one thread does from a segment's first token to its last (or back).
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

// One head's decays over one chunk, from the running sum a of dt A: the sums themselves in two
// parts, since differences of large sums have to be as exact as the steps they consist of.
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
    total += (double)d.step[l] * A;
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

// e^(a_l - a_s) for s and the tokens after it: any finite number where s is after l.
template <bool STEEP>
INLINE vec decay_between(const Decay& d, int64_t l, int64_t s) {
  if (!STEEP) return d.grow[l] * load(d.shrink + s);
  return decayed((d.high[l] - load(d.high + s)) + (d.low[l] - load(d.low + s)));
}

// `value` where s, s + 1, ... are not after l, and zero elsewhere.
INLINE vec until(int64_t l, int64_t s, vec value) {
  ivec lane;
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) lane[i] = i;
  return lane <= (int32_t)(l - s) ? value : vec{};
}

// Decayed scores: what token l takes of x_s, and of its own through D.
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

void copy_rows(const float* from, int64_t ld, int64_t rows, int64_t columns, float* to,
               int64_t ld_to) {
  for (int64_t r = 0; r < rows; r++) memcpy(to + r * ld_to, from + r * ld, 4 * columns);
}

// to = from * factor, n elements.
INLINE void scale(const float* from, float factor, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load(from + i) * factor);
  for (; i < n; i++) to[i] = from[i] * factor;
}

bool is_zero(const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    if (from[i] != 0) return false;
  return true;
}

// Room for the forward pass of one unit, for blocks of `width` columns.
struct ForwardRoom {
  int64_t ldw, ldn;
  float *x, *late_x, *state, *B, *C, *B_turned, *scores, *weights;
  Decay* decays;
  static int64_t floats(const Shape& s) {
    const int64_t ldw = pitch(s.block() * s.head_dim), ldn = pitch(s.d_state);
    return 2 * CHUNK * ldw + s.d_state * (ldw + SQUARE) + 2 * CHUNK * (ldn + SQUARE) +
           s.block() * (int64_t)sizeof(Decay) / 4;
  }
  ForwardRoom(const Shape& s, Scratch& scratch)
      : ldw(pitch(s.block() * s.head_dim)), ldn(pitch(s.d_state)) {
    x = scratch.take(CHUNK, ldw);
    late_x = scratch.take(CHUNK, ldw);
    state = scratch.take(s.d_state, ldw);
    B = scratch.take(CHUNK, ldn);
    C = scratch.take(CHUNK, ldn);
    B_turned = scratch.take(s.d_state, SQUARE);
    scores = scratch.take(CHUNK, SQUARE);
    weights = scratch.take(CHUNK, SQUARE);
    decays = (Decay*)scratch.take(s.block(), sizeof(Decay) / 4);
  }
};

// The state is kept as [d_state, columns of all heads], as products with C and B^T want it.
void scan(const Shape& s, const Operands& o, const Unit& u, const ForwardRoom& room, float* y,
          float* final) {
  const int64_t P = s.head_dim, N = s.d_state, width = u.heads * P, ldy = s.heads * P;
  const int64_t at_state = (u.segment * s.heads + u.head) * P * N;
  bool carries = !is_zero(o.initial + at_state, width * N);
  transpose(o.initial + at_state, N, width, N, room.state, room.ldw);
  for (int64_t first = u.first; first < u.first + u.tokens; first += CHUNK) {
    const int64_t n = smaller(CHUNK, u.first + u.tokens - first);
    const float* x = o.x + first * o.ldx + u.head * P;
    float* out = y + first * ldy + u.head * P;
    copy_rows(o.B + first * o.ldB + u.group * N, o.ldB, n, N, room.B, room.ldn);
    copy_rows(o.C + first * o.ldC + u.group * N, o.ldC, n, N, room.C, room.ldn);
    copy_rows(x, o.ldx, n, width, room.x, room.ldw);
    transpose(room.B, room.ldn, n, N, room.B_turned, SQUARE);
    gemm_to_lower(n, N, room.C, room.ldn, room.B_turned, SQUARE, room.scores, SQUARE);
    if (carries) gemm(n, width, N, room.C, room.ldn, 1, room.state, room.ldw, out, ldy);
    for (int64_t h = 0; h < u.heads; h++) {
      Decay& d = room.decays[h];
      decay_of(o.dt + first * o.lddt + u.head + h, o.lddt, o.A[u.head + h], n, d);
      if (carries)
        for (int64_t l = 0; l < n; l++)
          scale(out + l * ldy + h * P, d.since_start[l], P, out + l * ldy + h * P);
      (d.steep ? weigh<true> : weigh<false>)(n, room.scores, d, o.D[u.head + h], room.weights);
      gemm_lower(n, P, room.weights, SQUARE, room.x + h * P, room.ldw, out + h * P, ldy, carries);
      for (int64_t l = 0; l < n; l++)
        scale(room.x + l * room.ldw + h * P, d.step[l] * d.to_end[l], P,
              room.late_x + l * room.ldw + h * P);
    }
    for (int64_t i = 0; i < N && carries; i++)
      for (int64_t h = 0; h < u.heads; h++) {
        float* row = room.state + i * room.ldw + h * P;
        scale(row, room.decays[h].whole, P, row);
      }
    gemm(N, width, n, room.B, 1, room.ldn, room.late_x, room.ldw, room.state, room.ldw, carries);
    carries = true;
  }
  transpose(room.state, room.ldw, N, width, final + at_state, N);
}

// One token of R consecutive rows of a head's state: h = decay h + x B^T, y = h C + D x.
template <int R>
INLINE void step_rows(int64_t N, const float* h, float* to, float decay, float dt, float D,
                      const float* x, const float* B, const float* C, float* y) {
  vec total[LANES]{};
  float added[R];
  for (int r = 0; r < R; r++) added[r] = dt * x[r];
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
  for (int r = 0; r < R; r++) y[r] = sums[r] + D * x[r];
}

// The recurrence, token by token; only the first reads `initial`, the others find in the cache what
// the one before has written.
void steps(const Shape& s, const Operands& o, int64_t row, int64_t length, int64_t head, float* y,
           float* final) {
  const int64_t P = s.head_dim, N = s.d_state, group = head / s.per_group();
  const int64_t at_state = (row * s.heads + head) * P * N;
  const float* from = o.initial + at_state;
  float* to = final + at_state;
  for (int64_t t = row * length; t < (row + 1) * length; t++, from = to) {
    const float dt = o.dt[t * o.lddt + head], D = o.D[head];
    const float decay = decayed(splat(dt * o.A[head]))[0];
    const float *x = o.x + t * o.ldx + head * P, *B = o.B + t * o.ldB + group * N;
    const float* C = o.C + t * o.ldC + group * N;
    float* out = y + (t * s.heads + head) * P;
    int64_t p = 0;
    for (; p + STEP_ROWS <= P; p += STEP_ROWS)
      step_rows<STEP_ROWS>(N, from + p * N, to + p * N, decay, dt, D, x + p, B, C, out + p);
    for (; p < P; p++)
      step_rows<1>(N, from + p * N, to + p * N, decay, dt, D, x + p, B, C, out + p);
  }
}
}  // namespace

extern "C" {

// As ssd_forward, for `rows` segments of `length` tokens each.
void ssd_steps(const float* x, const float* dt, const float* A, const float* B, const float* C,
               const float* D, const float* initial, float* y, float* final, int64_t rows,
               int64_t length, int64_t heads, int64_t head_dim, int64_t groups, int64_t d_state,
               int64_t ldx, int64_t lddt, int64_t ldB, int64_t ldC, int64_t threads) {
  const Shape s{heads, head_dim, groups, d_state};
  const Operands o{x, dt, A, B, C, D, initial, ldx, lddt, ldB, ldC};
#pragma omp parallel for num_threads(threads) if (rows * heads * head_dim * d_state > WORTH_THREADS)
  for (int64_t i = 0; i < rows * heads; i++)
    steps(s, o, i / heads, length, i % heads, y, final);
}

// y [tokens, heads, head_dim] and the states after each segment.
void ssd_forward(const float* x, const float* dt, const float* A, const float* B, const float* C,
                 const float* D, const float* initial, const int64_t* bounds, float* y,
                 float* final, int64_t segments, int64_t heads, int64_t head_dim, int64_t groups,
                 int64_t d_state, int64_t ldx, int64_t lddt, int64_t ldB, int64_t ldC,
                 int64_t threads) {
  const Shape s{heads, head_dim, groups, d_state};
  const Operands o{x, dt, A, B, C, D, initial, ldx, lddt, ldB, ldC};
  const int64_t units = segments * groups * s.blocks();
  const bool worth = units > 1 && bounds[segments] * heads * head_dim * d_state > WORTH_THREADS;
#pragma omp parallel num_threads(threads) if (worth)
  {
    Scratch scratch(ForwardRoom::floats(s));
    const ForwardRoom room(s, scratch);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < units; i++) scan(s, o, Unit(s, bounds, i), room, y, final);
  }
}
}
