// NVFP4 quantization of whole tensors (nvfp4.h, by_error.h, ms_eden.h).
#include "by_error.h"
#include "ms_eden.h"

namespace {
using namespace nvfp4;
// Kinds of blocks; 0 is 16 along a row.
constexpr int64_t TILES = 1, COLUMNS = 2, ROWS_OF_FOUR_OVER_SIX = 3, ROWS_OF_MSE = 4;

// codes and scales, or values, of x [rows, d], whose tensors have `of_one` rows each. amax is found
// where `given` is 0; `signs` is null without a transform, which is along columns; `places` is null
// to nearest.
void quantize(Team& team, const float* x, float* amax, uint8_t* codes, uint8_t* scales,
              float* values, const float* signs, const int64_t* places, int64_t rows,
              int64_t of_one, int64_t d, int64_t kind, int64_t given, int64_t narrow,
              int64_t first_column, int64_t seed, int64_t stream, int64_t rounds) {
  if (signs) {
    transform(team, x, signs, values, amax, rows, of_one, d, d, given, narrow);
    x = values;
  } else if (!given) {
    find_amax(team, x, amax, rows, of_one, d, d);
  }
  team.wait();
  const Output out{codes, scales, values};
  const Random random{(uint32_t)seed, (uint32_t)stream, rounds};
  const auto run = [&](auto body) {
    body(team, x, amax, out, rows, of_one, d, d, places, first_column, random);
  };
  if (kind == COLUMNS) places ? run(along_columns<true>) : run(along_columns<false>);
  else if (kind == ROWS_OF_FOUR_OVER_SIX)
    by_error<FourOrSix>(team, x, amax, out, rows, of_one, d, d);
  else if (kind == ROWS_OF_MSE) by_error<LeastError>(team, x, amax, out, rows, of_one, d, d);
  else if (kind == TILES) places ? run(along_rows<BLOCK, true>) : run(along_rows<BLOCK, false>);
  else places ? run(along_rows<1, true>) : run(along_rows<1, false>);
}

// Values [rows, d] of MS-EDEN, with groups along rows or columns, rotated by the signs of one
// stream and rounded by another. `places` are those of the rows, or columns, of one tensor; amax is
// found where `given` is 0.
void ms_eden(Team& team, const float* x, float* amax, float* values, const int64_t* places,
             int64_t rows, int64_t of_one, int64_t d, int64_t columns, int64_t given,
             int64_t first_block, int64_t sign_seed, int64_t sign_stream, int64_t seed,
             int64_t stream, int64_t rounds) {
  const Rotation by(columns ? of_one : d, {(uint32_t)sign_seed, (uint32_t)sign_stream, rounds});
  const Random random{(uint32_t)seed, (uint32_t)stream, rounds};
  const auto run = [&](auto rotate, auto round) {
    rotate(team, x, by, values, amax, rows, of_one, d, d, given);
    team.wait();
    round(team, values, amax, by.size, rows, of_one, d, d, places, first_block, random);
  };
  columns ? run(rotate_columns, ms_eden_columns) : run(rotate_rows, ms_eden_rows);
}
}  // namespace

PARALLEL_KERNEL(nvfp4_quantize, quantize)
PARALLEL_KERNEL(nvfp4_ms_eden, ms_eden)
