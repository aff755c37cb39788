// Scratch memory of one thread for packed operands, and the distance between their rows.
#pragma once
#include <cstdint>
#include <cstdlib>

#include "bfloat16.h"

// Floats in a row of scratch: whole cache lines, an odd number of them, so that equal columns of
// consecutive rows map to different cache sets.
constexpr int64_t pitch(int64_t n) { return ((n + 15) / 16 | 1) * 16; }

// The same for elements of a type.
template <class E>
constexpr int64_t pitch_of(int64_t n) {
  constexpr int64_t IN_A_FLOAT = sizeof(float) / sizeof(E);
  return pitch((n + IN_A_FLOAT - 1) / IN_A_FLOAT) * IN_A_FLOAT;
}

// An allocation that is handed out piece by piece.
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
  // Rows of `ld` elements, a number that fills whole floats.
  template <class E>
  E* take_as(int64_t rows, int64_t ld) {
    return (E*)take(rows, ld * sizeof(E) / sizeof(float));
  }

 private:
  float *memory, *next;
};
