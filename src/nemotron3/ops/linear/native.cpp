// Dense products with a weight matrix [out, in]: y = x W^T, and its two gradients.
//
// Many rows go through gemm.h in blocks. A block belongs to one thread and has as many rows as its
// L2 cache holds, so that the other operand is loaded seldom. The forward pass transposes strips of
// W, so that its vectors run along the outputs; the gradients need no transposing. A few rows
// (decoding) go through rows.h, which reads W once, without transposing.
//
// Activations are float32, or bfloat16 with a W of either type, whose products are those of
// gemm_bfloat16.h. Gradients of weights are float32 in both cases: they are sums over all tokens.
#include <algorithm>

#include "low_rank.h"
#include "packed.h"
#include "gemm_bfloat16.h"
#include "int8_activations.h"
#include "rows.h"
#include "scratch.h"
#include "team.h"

namespace {
using std::min;
constexpr int64_t STRIP = detail::WIDTH;
constexpr int64_t DEPTH = detail::DEPTH;
constexpr int64_t SLICE = 512;    // most inputs of a block of x
constexpr int64_t COLUMNS = 512;  // of the result that a block computes while it is cached
constexpr int64_t MIN_PARALLEL_WORK = 1 << 15;  // multiply-adds below which a second thread costs more

// y [rows, outputs] = x [rows, inputs] W^T.
template <class X, class W, class Y>
void product(Team& team, const X* x, W w, Y* y, int64_t rows, int64_t outputs, int64_t inputs,
             int64_t ldx) {
  if (rows <= FEW_ROWS) {
    const Range part = team.share(outputs, LANES);
    few_rows(rows, x, ldx, w, part.first, part.last, inputs, y, outputs);
    return;
  }
  // Pairs of blocks and strips are distributed: with few rows, all threads share one block.
  constexpr bool NARROW = std::is_same_v<X, bfloat16>;  // its products keep incomplete sums
  const int64_t slice = NARROW || rows <= most_rows(inputs) ? inputs : min(inputs, SLICE);
  const int64_t block = block_rows(rows, NARROW ? (slice + 1) / 2 : slice);
  const int64_t blocks = (rows + block - 1) / block;
  const int64_t strips = (outputs + STRIP - 1) / STRIP;
  const Range part = team.share(blocks * strips);
  for (int64_t task = part.first; task < part.last;) {
    const int64_t row = task / strips * block, first = task % strips * STRIP;
    const int64_t some = min(part.last - task, min(COLUMNS / STRIP, strips - task % strips));
    const int64_t width = min(outputs - first, some * STRIP), h = min(rows - row, block);
    for (int64_t t = 0; t < inputs || t == 0; t += slice)
      gemm_turned(h, width, min(inputs - t, slice), x + row * ldx + t, ldx, 1,
                  from_column(from_row(w, first, inputs), t), inputs, y + row * outputs + first,
                  outputs, t);
    task += some;
  }
}

// The same with rounded activations, by one kernel for any number of rows. With many of them every
// thread has rows of its own, so that it rounds no others.
template <class W>
void product(Team& team, const float* x, Int8Activations<W> w, float* y, int64_t rows,
             int64_t outputs, int64_t inputs, int64_t ldx) {
  if (rows <= FEW_ROWS * team.threads) {
    const Range part = team.share(outputs, LANES);
    few_rows(rows, x, ldx, w, part.first, part.last, inputs, y, outputs);
    return;
  }
  const Range part = team.share(rows, detail::MOST);
  few_rows(part.last - part.first, x + part.first * ldx, ldx, w, 0, outputs, inputs,
           y + part.first * outputs, outputs);
}

template <class X, class W, class Y>
void forward(Team& team, const X* x, const W* w, Y* y, int64_t rows, int64_t outputs,
             int64_t inputs, int64_t ldx) {
  product(team, x, w, y, rows, outputs, inputs, ldx);
}

void forward_int8(Team& team, const float* x, const int8_t* codes, const float* scales, float* y,
                  int64_t rows, int64_t outputs, int64_t inputs, int64_t ldx) {
  product(team, x, Int8Rows{codes, scales}, y, rows, outputs, inputs, ldx);
}

void forward_fp8(Team& team, const float* x, const uint8_t* codes, const float* scales, float* y,
                 int64_t rows, int64_t outputs, int64_t inputs, int64_t ldx) {
  product(team, x, FP8Rows{codes, scales}, y, rows, outputs, inputs, ldx);
}

void forward_nvfp4(Team& team, const float* x, const uint8_t* codes, const uint8_t* blocks,
                   const float* tensor_scales, float* y, int64_t rows, int64_t outputs,
                   int64_t inputs, int64_t ldx) {
  product(team, x, NVFP4Rows{codes, blocks, tensor_scales}, y, rows, outputs, inputs, ldx);
}

void forward_int8_int8(Team& team, const float* x, const int8_t* codes, const float* scales,
                       float* y, int64_t rows, int64_t outputs, int64_t inputs, int64_t ldx) {
  product(team, x, Int8Activations<Int8Rows>{{codes, scales}}, y, rows, outputs, inputs, ldx);
}

void forward_nvfp4_int8(Team& team, const float* x, const uint8_t* codes, const uint8_t* blocks,
                        const float* tensor_scales, float* y, int64_t rows, int64_t outputs,
                        int64_t inputs, int64_t ldx) {
  product(team, x, Int8Activations<NVFP4Rows>{{codes, blocks, tensor_scales}}, y, rows, outputs,
          inputs, ldx);
}

// y [rows, outputs] += scale (x A^T) B^T; `narrow` [rows, rank] is scratch memory.
void low_rank(Team& team, const float* x, const float* A, const float* B, float* narrow, float* y,
              int64_t rows, int64_t outputs, int64_t inputs, int64_t rank, int64_t ldx,
              float scale) {
  const LowRank change{A, B, rank, scale};
  const Range own = team.share(rows), part = team.share(outputs, LANES);
  narrow_rows(own.last - own.first, inputs, x + own.first * ldx, ldx, change,
              narrow + own.first * rank);
  team.wait();
  add_change(rows, part.first, part.last, narrow, change, y, outputs);
}

// Columns of a matrix, stored apart from its other columns.
struct Part {
  const void* at;
  int64_t ld, columns;
};

// Pack some lines of some columns, which may be in several parts.
template <class E>
void copy_lines(const Part* part, int64_t line, int64_t lines, int64_t column, int64_t columns,
                E* to, int64_t ld_to) {
  for (; column >= part->columns; part++) column -= part->columns;
  for (; columns > 0; part++, column = 0) {
    const int64_t some = min(columns, part->columns - column);
    const E* from = (const E*)part->at + line * part->ld + column;
    for (int64_t i = 0; i < lines; i++)
      memcpy(to + i * ld_to, from + i * part->ld, sizeof(E) * some);
    columns -= some;
    to += some;
  }
}

// C [rows, columns] = A B, added to C if `add`. A is a matrix of elements E in parts or, if
// `turned`, the transpose of one. Its blocks are packed, since the lines of a wide matrix would map
// to a few cache sets. B is numbers or codes. Sums of a bfloat16 C are kept in float32 until they
// are complete.
template <class E, class B, class C>
void multiply(int64_t rows, int64_t columns, int64_t depth, const Part* a, bool turned, B b,
              int64_t ldb, C* c, bool add, int64_t threads) {
  constexpr bool WIDE = std::is_same_v<C, float>;
  constexpr int64_t DEEP = std::is_same_v<E, bfloat16> ? detail::SLICE : DEPTH;
  const int64_t block = block_rows(rows, DEPTH + COLUMNS, threads);
  const int64_t ld = turned ? pitch_of<E>(block) : pitch_of<E>(DEEP), lines = turned ? DEEP : block;
  const int64_t across = (columns + COLUMNS - 1) / COLUMNS;
  parallel_region(rows * columns * depth > MIN_PARALLEL_WORK ? threads : 1, [&](Team& team) {
    Scratch scratch(lines * ld + (WIDE ? 0 : block * COLUMNS));
    E* near = scratch.take_as<E>(lines, ld);
    float* sums = WIDE ? nullptr : scratch.take(block, COLUMNS);
    const Range share = team.share((rows + block - 1) / block * across);
    for (int64_t i = share.first; i < share.last; i++) {
      const int64_t m = i / across * block, n = i % across * COLUMNS;
      const int64_t height = min(rows - m, block), width = min(columns - n, COLUMNS);
      C* to = c + m * columns + n;
      for (int64_t t = 0; t < depth || t == 0; t += DEEP) {
        const int64_t part = min(depth - t, DEEP);
        if (turned) copy_lines(a, t, part, m, height, near, ld);
        else copy_lines(a, m, height, t, part, near, ld);
        const auto near_b = from_column(from_row(b, t, ldb), n);
        const int64_t a_row = turned ? 1 : ld, a_depth = turned ? ld : 1;
        if constexpr (WIDE)
          gemm(height, width, part, near, a_row, a_depth, near_b, ldb, to, columns, add || t);
        else gemm(height, width, part, near, a_row, a_depth, near_b, ldb, sums, COLUMNS, t);
      }
      for (int64_t r = 0; !WIDE && r < height; r++)
        copy_numbers(sums + r * COLUMNS, width, to + r * columns);
    }
  });
}

// dx [rows, inputs] = dy [rows, outputs] W; dy in parts.
template <class E, class W>
void backward_input(const Part* dy, const W* w, E* dx, int64_t rows, int64_t outputs,
                    int64_t inputs, int64_t threads) {
  multiply<E>(rows, inputs, outputs, dy, false, w, inputs, dx, false, threads);
}

// dW [outputs, inputs] = dy^T x, added to dW if `add`; dy in parts.
template <class E>
void backward_weight(const Part* dy, const E* x, float* dw, int64_t rows, int64_t outputs,
                     int64_t inputs, int64_t ldx, int64_t add, int64_t threads) {
  multiply<E>(outputs, inputs, rows, dy, true, x, ldx, dw, add, threads);
}
}  // namespace

typedef float float32;
#define FORWARD(X, W, Y) PARALLEL_KERNEL(linear_forward_##X##_##W##_##Y, (forward<X, W, Y>))
FORWARD(float32, float32, float32)
FORWARD(float32, bfloat16, float32)
FORWARD(bfloat16, bfloat16, bfloat16)
FORWARD(bfloat16, bfloat16, float32)
FORWARD(bfloat16, float32, bfloat16)
FORWARD(bfloat16, float32, float32)
PARALLEL_KERNEL(linear_forward_int8, forward_int8)
PARALLEL_KERNEL(linear_forward_fp8, forward_fp8)
PARALLEL_KERNEL(linear_forward_nvfp4, forward_nvfp4)
PARALLEL_KERNEL(linear_forward_int8_int8, forward_int8_int8)
PARALLEL_KERNEL(linear_forward_nvfp4_int8, forward_nvfp4_int8)
PARALLEL_KERNEL(linear_low_rank, low_rank)

extern "C" {

#define BACKWARD_INPUT(E, W)                                                                \
  void linear_backward_input_##E##_##W(const Part* dy, const W* w, E* dx, int64_t rows,     \
                                       int64_t outputs, int64_t inputs, int64_t threads) {  \
    backward_input(dy, w, dx, rows, outputs, inputs, threads);                              \
  }
BACKWARD_INPUT(float32, float32)
BACKWARD_INPUT(bfloat16, bfloat16)
BACKWARD_INPUT(bfloat16, float32)

#define BACKWARD_WEIGHT(E)                                                                    \
  void linear_backward_weight_##E(const Part* dy, const E* x, float* dw, int64_t rows,        \
                                  int64_t outputs, int64_t inputs, int64_t ldx, int64_t add,  \
                                  int64_t threads) {                                          \
    backward_weight(dy, x, dw, rows, outputs, inputs, ldx, add, threads);                     \
  }
BACKWARD_WEIGHT(float32)
BACKWARD_WEIGHT(bfloat16)

// dx with the codes of a weight, a tile of which is decoded at a time.
void linear_backward_input_int8(const Part* dy, const int8_t* codes, const float* scales, float* dx,
                                int64_t rows, int64_t outputs, int64_t inputs, int64_t threads) {
  multiply<float>(rows, inputs, outputs, dy, false, Int8Rows{codes, scales}, inputs, dx, false, threads);
}

void linear_backward_input_fp8(const Part* dy, const uint8_t* codes, const float* scales, float* dx,
                               int64_t rows, int64_t outputs, int64_t inputs, int64_t threads) {
  multiply<float>(rows, inputs, outputs, dy, false, FP8Rows{codes, scales}, inputs, dx, false, threads);
}

void linear_backward_input_nvfp4(const Part* dy, const uint8_t* codes, const uint8_t* blocks,
                                 const float* tensor_scales, float* dx, int64_t rows,
                                 int64_t outputs, int64_t inputs, int64_t threads) {
  multiply<float>(rows, inputs, outputs, dy, false, NVFP4Rows{codes, blocks, tensor_scales}, inputs,
                  dx, false, threads);
}
}
