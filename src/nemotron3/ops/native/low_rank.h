// A low-rank change beside a weight [out, in]: W + scale B A, which is multiplied apart.
#pragma once
#include "gemm.h"

struct LowRank {
  const float *A, *B;  // [rank, in] and [out, rank]; null without a change
  int64_t rank;
  float scale;
};

// That of one of several stacked matrices.
static inline LowRank of_expert(LowRank c, int64_t expert, int64_t outputs, int64_t inputs) {
  if (c.A) {
    c.A += expert * c.rank * inputs;
    c.B += expert * outputs * c.rank;
  }
  return c;
}

// narrow [rows, rank] = scale x A^T.
static inline void narrow_rows(int64_t rows, int64_t inputs, const float* x, int64_t ldx, LowRank c,
                               float* narrow) {
  gemm_turned(rows, c.rank, inputs, x, ldx, 1, c.A, inputs, narrow, c.rank);
  for (int64_t i = 0; i < rows * c.rank; i++) narrow[i] *= c.scale;
}

// y [rows, first..last) += narrow B^T.
static inline void add_change(int64_t rows, int64_t first, int64_t last, const float* narrow,
                              LowRank c, float* y, int64_t ldy) {
  gemm_turned(rows, last - first, c.rank, narrow, c.rank, 1, c.B + first * c.rank, c.rank,
              y + first, ldy, true);
}
