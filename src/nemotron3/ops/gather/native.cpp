// Copy rows of many tensors: each thread copies its part of every row.
#include <cstring>

#include "team.h"

namespace {
constexpr int64_t LINE = 64;

struct Pair {
  char* target;
  const char* source;
  int64_t row_bytes;
};

void copy_rows(Team& team, const Pair* pairs, const int64_t* to, const int64_t* places,
               int64_t count, int64_t rows) {
  for (int64_t p = 0; p < count; p++) {
    const Pair& pair = pairs[p];
    const Range part = team.share(pair.row_bytes, LINE);
    for (int64_t r = 0; part.first < part.last && r < rows; r++)
      memcpy(pair.target + to[r] * pair.row_bytes + part.first,
             pair.source + places[r] * pair.row_bytes + part.first, part.last - part.first);
  }
}
}  // namespace

PARALLEL_KERNEL(copy_rows, copy_rows)
