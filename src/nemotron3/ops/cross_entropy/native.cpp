// The softmax of cross-entropy: from rows of logits to losses and, in place, to gradients.
#include "bfloat16.h"
#include "team.h"

namespace {
struct Largest {
  float value;
  int64_t index;
};

Largest largest(const float* row, int64_t n) {
  // Four independent runs, since each comparison waits for the previous one of its run.
  constexpr int64_t RUNS = 4;
  vec most[RUNS];
  for (int64_t i = 0; i < RUNS; i++) most[i] = splat(-__builtin_inff());
  int64_t j = 0;
  for (; j + RUNS * LANES <= n; j += RUNS * LANES)
#pragma GCC unroll 4
    for (int64_t i = 0; i < RUNS; i++) most[i] = max(load(row + j + i * LANES), most[i]);
  float lanes[RUNS * LANES];
  memcpy(lanes, most, sizeof lanes);
  float value = -__builtin_inff();
  for (float lane : lanes) value = lane > value ? lane : value;
  for (; j < n; j++) value = row[j] > value ? row[j] : value;
  int64_t index = 0;
  while (index < n - 1 && row[index] != value) index++;
  return {value, index};
}

// Replace each element by e^(element - shift), and return the sum.
float exponentials(float* row, int64_t n, float shift) {
  constexpr int64_t RUNS = 4;
  vec total[RUNS]{};
  int64_t j = 0;
  for (; j + RUNS * LANES <= n; j += RUNS * LANES)
#pragma GCC unroll 4
    for (int64_t i = 0; i < RUNS; i++) {
      const vec e = exp(load(row + j + i * LANES) - shift);
      total[i] += e;
      store(row + j + i * LANES, e);
    }
  for (; j < n; j += LANES) {
    const int64_t left = n - j < LANES ? n - j : LANES;
    vec e = exp(load_part(row + j, left) - shift);
    store_part(row + j, e, left);
    e = load_part(row + j, left);  // zero beyond the row
    total[0] += e;
  }
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// Loss of one row, which is overwritten. Its gradient may be of another type, in other memory.
template <class G>
void loss_of_row(float* row, int64_t target, const float* weight, int64_t n, G* gradient,
                 float* loss, uint8_t* correct) {
  const float at_target = row[target];
  const Largest best = largest(row, n);
  const float total = exponentials(row, n, best.value);
  *loss = __builtin_logf(total) + (best.value - at_target);
  *correct = best.index == target;
  if (!weight) return;
  const float scale = *weight / total;
  int64_t j = 0;
  const float at_target_now = row[target] * scale - *weight;
  for (; j + LANES <= n; j += LANES) store(gradient + j, load(row + j) * scale);
  for (; j < n; j++) put(gradient + j, row[j] * scale);
  put(gradient + target, at_target_now);
}
}  // namespace

extern "C" {

// losses [rows] and correct [rows] (bytes) of logits [rows, n] against targets. The logits are
// overwritten. Where `weights` is given, weight * (softmax - one_hot(target)) is written in their
// place, or to `narrow` [rows, n] if that is not null.
void cross_entropy_rows(float* logits, const int64_t* targets, const float* weights, float* losses,
                        uint8_t* correct, bfloat16* narrow, int64_t rows, int64_t n,
                        int64_t threads) {
  parallel_region(threads, [&](Team& team) {
    const Range part = team.share(rows);
    for (int64_t r = part.first; r < part.last; r++) {
      float* row = logits + r * n;
      const float* weight = weights ? weights + r : nullptr;
      if (narrow)
        loss_of_row(row, targets[r], weight, n, narrow + r * n, losses + r, correct + r);
      else loss_of_row(row, targets[r], weight, n, row, losses + r, correct + r);
    }
  });
}
}
