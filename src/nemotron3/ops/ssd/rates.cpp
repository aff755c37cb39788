// The scan's step sizes and decay rates.
#include <cmath>
#include <cstdint>

#include "team.h"

namespace {
// As in PyTorch: beyond 20 the difference from x is below float32's resolution.
float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// steps [tokens, heads] = softplus(dt + bias), decay [heads] = -e^A_log; dt has rows of lddt
// elements.
void rates(Team& team, const float* dt, const float* bias, const float* A_log, float* steps,
           float* decay, int64_t tokens, int64_t heads, int64_t lddt) {
  const Range part = team.share(heads);
  for (int64_t h = part.first; h < part.last; h++) decay[h] = -std::exp(A_log[h]);
  const Range rows = team.share(tokens);
  for (int64_t t = rows.first; t < rows.last; t++)
    for (int64_t h = 0; h < heads; h++)
      steps[t * heads + h] = softplus(dt[t * lddt + h] + bias[h]);
}
}  // namespace

PARALLEL_KERNEL(ssd_rates, rates)
