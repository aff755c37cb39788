// A list of operations that one team of threads runs one after another, and compiled versions of
// the PyTorch operations that such programs need.
#include "simd.h"
#include "team.h"

namespace {
// to = a + b, n elements.
void add(Team& team, const float* a, const float* b, float* to, int64_t n) {
  const Range part = team.share(n, LANES);
  int64_t i = part.first;
  for (; i + LANES <= part.last; i += LANES) store(to + i, load(a + i) + load(b + i));
  for (; i < part.last; i++) to[i] = a[i] + b[i];
}

// to [rows, width] = the rows of `table` at `indices`.
void embedding(Team& team, const float* table, const int64_t* indices, float* to, int64_t rows,
               int64_t width) {
  const Range part = team.share(rows);
  for (int64_t r = part.first; r < part.last; r++)
    memcpy(to + r * width, table + indices[r] * width, 4 * width);
}

struct Call {
  void (*operation)(Team*, const int64_t*);
  const int64_t* words;
};
}  // namespace

PARALLEL_KERNEL(add, add)
PARALLEL_KERNEL(embedding, embedding)

extern "C" void run_program(const Call* calls, int64_t count, int64_t threads) {
  parallel_region(threads, [&](Team& team) {
    for (int64_t i = 0; i < count; i++) {
      calls[i].operation(&team, calls[i].words);
      team.wait();
    }
  });
}
