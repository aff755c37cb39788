// A list of operations that one team of threads runs one after another, and compiled versions of
// the PyTorch operations that such programs need.
#include "bfloat16.h"
#include "team.h"

namespace {
// to = a + b, n elements; sums of bfloat16 are rounded once.
template <class E>
void add(Team& team, const E* a, const E* b, E* to, int64_t n) {
  const Range part = team.share(n, LANES);
  int64_t i = part.first;
  for (; i + LANES <= part.last; i += LANES) store(to + i, load(a + i) + load(b + i));
  for (; i < part.last; i++) put(to + i, number(a[i]) + number(b[i]));
}

// to [rows, width] = the rows of `table` at `indices`.
template <class E>
void embedding(Team& team, const E* table, const int64_t* indices, E* to, int64_t rows,
               int64_t width) {
  const Range part = team.share(rows);
  for (int64_t r = part.first; r < part.last; r++)
    memcpy(to + r * width, table + indices[r] * width, sizeof(E) * width);
}

// to [rows, columns] = from, in another type; from has rows of `ld` elements.
template <class From, class To>
void cast(Team& team, const From* from, To* to, int64_t rows, int64_t columns, int64_t ld) {
  const Range part = rows == 1 ? team.share(columns, LANES) : Range{0, columns};
  const Range lines = rows == 1 ? Range{0, 1} : team.share(rows);
  for (int64_t r = lines.first; r < lines.last; r++)
    copy_numbers(from + r * ld + part.first, part.last - part.first,
                 to + r * columns + part.first);
}

struct Call {
  void (*operation)(Team*, const int64_t*);
  const int64_t* words;
};
}  // namespace

PARALLEL_KERNEL(add_float32, add<float>)
PARALLEL_KERNEL(add_bfloat16, add<bfloat16>)
PARALLEL_KERNEL(embedding_float32, embedding<float>)
PARALLEL_KERNEL(embedding_bfloat16, embedding<bfloat16>)
PARALLEL_KERNEL(cast_to_bfloat16, (cast<float, bfloat16>))
PARALLEL_KERNEL(cast_to_float32, (cast<bfloat16, float>))

// Whether the processor multiplies bfloat16 itself; otherwise its products are those of float32.
extern "C" int64_t multiplies_bfloat16() { return MULTIPLIES_BFLOAT16; }

extern "C" void run_program(const Call* calls, int64_t count, int64_t threads) {
  parallel_region(threads, [&](Team& team) {
    for (int64_t i = 0; i < count; i++) {
      calls[i].operation(&team, calls[i].words);
      team.wait();
    }
  });
}
