// Dense products with a weight matrix [out, in]: y = x W^T, and its two gradients.
//
// Many rows go through gemm.h in blocks, each of which belongs to one thread. The forward pass turns
// a strip of W at a time, so that its vectors run along the outputs; the gradients need no turning.
// A few rows (decoding) go through rows.h, which reads W once, as it lies.
#include <memory>

#include "gemm.h"
#include "rows.h"
#include "team.h"

namespace {
constexpr int64_t STRIP = detail::WIDTH;
constexpr int64_t DEPTH = detail::DEPTH;
constexpr int64_t BLOCK = 240;  // rows of a task at most: a multiple of every tile's
constexpr int64_t WORTH_THREADS = 1 << 15;  // multiply-adds below which a second thread costs more

// Rows of a task, so that all threads get as many: whole tiles, BLOCK at most.
int64_t share(int64_t rows, int64_t threads) {
  const int64_t tasks = (rows + BLOCK * threads - 1) / (BLOCK * threads) * threads;
  return (rows + tasks * TILE_ROWS - 1) / (tasks * TILE_ROWS) * TILE_ROWS;
}
// y [rows, outputs] = x [rows, inputs] W^T.
void forward(Team& team, const float* x, const float* w, float* y, int64_t rows, int64_t outputs,
             int64_t inputs, int64_t ldx) {
  if (rows <= FEW_ROWS) {
    const Range part = team.share(outputs, LANES);
    few_rows(rows, x, ldx, w, part.first, part.last, inputs, y, outputs);
    return;
  }
  const int64_t strips = (outputs + STRIP - 1) / STRIP, blocks = (rows + BLOCK - 1) / BLOCK;
  const std::unique_ptr<float[]> turned(new float[STRIP * inputs]);
  const Range part = team.share(strips * blocks);
  int64_t held = -1;
  for (int64_t task = part.first; task < part.last; task++) {
    const int64_t strip = task / blocks, row = task % blocks * BLOCK, n = strip * STRIP;
    const int64_t width = outputs - n < STRIP ? outputs - n : STRIP;
    if (strip != held) transpose(w + n * inputs, inputs, width, inputs, turned.get(), STRIP);
    held = strip;
    gemm(rows - row < BLOCK ? rows - row : BLOCK, width, inputs, x + row * ldx, ldx, 1,
         turned.get(), STRIP, y + row * outputs + n, outputs);
  }
}
}  // namespace

SHARED(linear_forward, forward)

extern "C" {

// dx [rows, inputs] = dy [rows, outputs] W.
void linear_backward_input(const float* dy, const float* w, float* dx, int64_t rows,
                           int64_t outputs, int64_t inputs, int64_t lddy, int64_t threads) {
  const int64_t block = share(rows, threads);
#pragma omp parallel for num_threads(threads) if (rows * outputs * inputs > WORTH_THREADS)
  for (int64_t row = 0; row < rows; row += block)
    gemm(rows - row < block ? rows - row : block, inputs, outputs, dy + row * lddy, lddy, 1, w,
         inputs, dx + row * inputs, inputs);
}

// dW [outputs, inputs] = dy^T x, added to dW where `add`.
void linear_backward_weight(const float* dy, const float* x, float* dw, int64_t rows,
                            int64_t outputs, int64_t inputs, int64_t lddy, int64_t ldx, int64_t add,
                            int64_t threads) {
  const int64_t block = share(outputs, threads);
#pragma omp parallel num_threads(threads) if (rows * outputs * inputs > WORTH_THREADS)
  {
    float* columns = new float[DEPTH * BLOCK];  // of dy, brought together
#pragma omp for
    for (int64_t n = 0; n < outputs; n += block) {
      const int64_t width = outputs - n < block ? outputs - n : block;
      for (int64_t t = 0; t < rows; t += DEPTH) {
        const int64_t depth = rows - t < DEPTH ? rows - t : DEPTH;
        for (int64_t r = 0; r < depth; r++)
          memcpy(columns + r * BLOCK, dy + (t + r) * lddy + n, 4 * width);
        gemm(width, inputs, depth, columns, 1, BLOCK, x + t * ldx, ldx, dw + n * inputs, inputs,
             add || t);
      }
    }
    delete[] columns;
  }
}
}
