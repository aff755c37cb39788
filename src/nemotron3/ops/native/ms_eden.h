// MS-EDEN as defined by ops/nvfp4/ms_eden.py, in two passes: the rotation of each group, with the
// largest magnitude, and the rounding of what is rotated, in place. Groups lie along rows or along
// columns. A group's two sums are of 16 partial sums, of every 16th element each.
#pragma once
#include "nvfp4.h"

EXACT_BEGIN
namespace nvfp4 {
constexpr int64_t MOST_GROUP = 128;
constexpr double RANGE_OF_MS_EDEN = 6.0 / (17.0 / 16.0 * 0.93);

// Sums and differences of lanes, 1 to LANES / 2 apart.
template <int STEP, int... I>
INLINE vec butterflies_of_lanes(vec v, std::integer_sequence<int, I...> lanes) {
  if constexpr (STEP < LANES) {
    const ivec sign = {((I & STEP) ? INT32_MIN : 0)...};
    const vec other = __builtin_shufflevector(v, v, (I ^ STEP)...);
    return butterflies_of_lanes<2 * STEP>(other + (vec)(bits(v) ^ sign), lanes);
  } else return v;
}

// Sums and differences of vectors, 1 to `vectors` / 2 apart.
INLINE void butterflies(float* v, int64_t vectors) {
  for (int64_t h = 1; h < vectors; h *= 2)
    for (int64_t i = 0; i < vectors; i += 2 * h)
      for (int64_t k = i; k < i + h; k++) {
        const vec a = load(v + k * LANES), b = load(v + (k + h) * LANES);
        store(v + k * LANES, a + b);
        store(v + (k + h) * LANES, a - b);
      }
}

// The rotation of groups of an axis of whole blocks, with random signs.
struct Rotation {
  int64_t size = MOST_GROUP;  // of a group
  float factors[MOST_GROUP];
  Rotation(int64_t axis, const Random& signs) {
    while (axis % size) size /= 2;
    const float scale = (float)(1 / std::sqrt((double)size));
    int32_t drawn[RANDOM_BLOCK];
    signs.draw(0, 0, drawn);
    for (int64_t i = 0; i < size; i++) factors[i] = drawn[i] & 1 ? -scale : scale;
  }
};

// y = each group of x rotated, along rows; the largest magnitudes are found where not given.
static void rotate_rows(Team& team, const float* x, const Rotation& by, float* y, float* amax,
                        int64_t rows, int64_t of_one, int64_t d, int64_t ld, bool given) {
  const Range part = team.share(rows);
  for (int64_t row = part.first; row < part.last; row++) {
    ivec most{};
    for (int64_t c = 0; c < d; c += by.size) {
      float* to = y + row * ld + c;
      for (int64_t i = 0; i < by.size; i += LANES) {
        const vec v = load(x + row * ld + c + i) * load(by.factors + i);
        store(to + i, butterflies_of_lanes<1>(v, std::make_integer_sequence<int, LANES>{}));
      }
      butterflies(to, by.size / LANES);
      for (int64_t i = 0; i < by.size; i += LANES)
        most = max(most, finite(magnitude(load(to + i))));
    }
    if (!given) raise(amax[row / of_one], largest(most));
  }
}

// The same along columns.
static void rotate_columns(Team& team, const float* x, const Rotation& by, float* y, float* amax,
                           int64_t rows, int64_t of_one, int64_t d, int64_t ld, bool given) {
  const Range part = team.share(rows / by.size);
  float group[MOST_GROUP * LANES];
  for (int64_t strip = part.first; strip < part.last; strip++) {
    const int64_t row = strip * by.size;
    ivec most{};
    for (int64_t c = 0; c < d; c += LANES) {
      for (int64_t i = 0; i < by.size; i++)
        store(group + i * LANES, load(x + (row + i) * ld + c) * by.factors[i]);
      butterflies(group, by.size);
      for (int64_t i = 0; i < by.size; i++) {
        const vec v = load(group + i * LANES);
        most = max(most, finite(magnitude(v)));
        store(y + (row + i) * ld + c, v);
      }
    }
    if (!given) raise(amax[row / of_one], largest(most));
  }
}

// Of LANES blocks: their scales before the factor of the group, and what elements are multiplied by.
struct Unfactored {
  ivec bad;
  vec scales, factors;
  Unfactored() = default;
  Unfactored(ivec amax, const Global& g) : bad(amax >= INFINITE) {
    const vec own = (vec)(bad ? ivec{} : amax);
    scales = nearest(min(own * (g.encode / (float)RANGE_OF_MS_EDEN), splat(448.0f)), E4M3).values;
    factors = scales > 0.0f ? g.encode / scales : vec{};
  }
};

INLINE Global of_ms_eden(float amax) { return Global(amax, (float)(RANGE_OF_MS_EDEN * 255.99)); }

INLINE vec rounded_element(vec x, vec factor) {
  const vec y = x * factor;  // NaN of a zero in a tensor so small that its factor is infinite
  return element<false>(y == y ? y : vec{}, nullptr).values;
}

// What the elements of blocks stand for, of scales times the factor of their group.
INLINE vec drawn_units(vec scales, vec group_factors, ivec bad, const int32_t* drawn,
                       const Global& g) {
  const vec wanted = min(scales * group_factors, splat(448.0f));
  return bad ? splat(NAN) : stochastic(wanted, E4M3, drawn).values * g.scale;
}

// Half of a vector's lanes, in double precision.
constexpr int HALF = LANES / 2;
typedef double dvec __attribute__((vector_size(8 * HALF)));
typedef float half_vec __attribute__((vector_size(4 * HALF)));
INLINE dvec widen(const float* from) {
  half_vec narrow;
  memcpy(&narrow, from, sizeof narrow);
  return __builtin_convertvector(narrow, dvec);
}

// Blocks along rows of `y`, which is rotated. `places` are those of the rows of one tensor, and
// element `first_block` + b of a row's noise is that of block b.
static void ms_eden_rows(Team& team, float* y, const float* amax, int64_t size, int64_t rows,
                         int64_t of_one, int64_t d, int64_t ld, const int64_t* places,
                         int64_t first_block, const Random& random) {
  Drawn drawn{random};
  const Range part = team.share(rows);
  int64_t tensor = -1;
  Global g(0);
  for (int64_t row = part.first; row < part.last; row++) {
    if (row / of_one != tensor) tensor = row / of_one, g = of_ms_eden(amax[tensor]);
    for (int64_t c = 0; c < d; c += CHUNK) {
      const int64_t blocks = (d - c < CHUNK ? d - c : CHUNK) / BLOCK;
      float* at = y + row * ld + c;
      ivec most[BLOCK]{};
      for (int64_t b = 0; b < blocks; b++)
        for (int64_t p = 0; p < PARTS; p++)
          most[b] = max(most[b], magnitude(load(at + b * BLOCK + p * LANES)));
      Unfactored of[PARTS];
      float scales[BLOCK], factors[BLOCK], groups[BLOCK]{}, units[BLOCK], values[CHUNK];
      for (int64_t p = 0; p < PARTS; p++) {
        of[p] = Unfactored(largest_of_each(most + p * LANES), g);
        store(scales + p * LANES, of[p].scales);
        store(factors + p * LANES, of[p].factors);
      }
      int32_t noise[BLOCK]{};
      for (int64_t first = 0; first < blocks; first += size / BLOCK) {
        dvec yy[BLOCK / HALF]{}, yq[BLOCK / HALF]{};
        for (int64_t b = first; b < first + size / BLOCK; b++) {
          noise[b] = *drawn.at((uint32_t)places[row % of_one], first_block + c / BLOCK + b);
          if (of[b / LANES].bad[b % LANES]) continue;
          float q[BLOCK];
          for (int64_t p = 0; p < BLOCK; p += LANES) {
            const vec value = rounded_element(load(at + b * BLOCK + p), splat(factors[b]));
            store(values + b * BLOCK + p, value);
            store(q + p, value * scales[b]);
          }
          for (int64_t j = 0; j < BLOCK / HALF; j++) {
            const dvec a = widen(at + b * BLOCK + j * HALF);
            yy[j] += a * a;
            yq[j] += a * widen(q + j * HALF);
          }
        }
        double sums[2][BLOCK];
        memcpy(sums[0], yy, sizeof yy);
        memcpy(sums[1], yq, sizeof yq);
        for (int h = BLOCK / 2; h; h /= 2)
          for (int i = 0; i < h; i++) sums[0][i] += sums[0][i + h], sums[1][i] += sums[1][i + h];
        const float factor =
            sums[1][0] > 0 ? (float)(sums[0][0] * (double)g.encode / sums[1][0]) : 1.0f;
        for (int64_t b = first; b < first + size / BLOCK; b++) groups[b] = factor;
      }
      for (int64_t p = 0; p < PARTS; p++)
        store(units + p * LANES, drawn_units(of[p].scales, load(groups + p * LANES), of[p].bad,
                                             noise + p * LANES, g));
      for (int64_t b = 0; b < blocks; b++)
        for (int64_t p = 0; p < BLOCK; p += LANES)
          store(at + b * BLOCK + p, load(values + b * BLOCK + p) * units[b]);
    }
  }
}

// Blocks along columns likewise; `places` are those of columns.
static void ms_eden_columns(Team& team, float* y, const float* amax, int64_t size, int64_t rows,
                            int64_t of_one, int64_t d, int64_t ld, const int64_t* places,
                            int64_t first_block, const Random& random) {
  const Range part = team.share(rows / size);
  const int64_t blocks = size / BLOCK;
  for (int64_t strip = part.first; strip < part.last; strip++) {
    const int64_t row = strip * size;
    const Global g = of_ms_eden(amax[row / of_one]);
    for (int64_t c = 0; c < d; c += LANES) {
      float* at = y + row * ld + c;
      Unfactored of[MOST_GROUP / BLOCK];
      for (int64_t b = 0; b < blocks; b++) {
        ivec most{};
        for (int64_t r = b * BLOCK; r < (b + 1) * BLOCK; r++)
          most = max(most, magnitude(load(at + r * ld)));
        of[b] = Unfactored(most, g);
      }
      float values[MOST_GROUP * LANES];
      dvec yy[BLOCK][2], yq[BLOCK][2];
      for (int64_t r = 0; r < BLOCK; r++) {
        dvec squares[2]{}, products[2]{};
        for (int64_t b = 0; b < blocks; b++) {
          const vec v = load(at + (b * BLOCK + r) * ld), x = of[b].bad ? vec{} : v;
          const vec value = rounded_element(x, of[b].factors), q = value * of[b].scales;
          store(values + (b * BLOCK + r) * LANES, value);
          for (int j = 0; j < 2; j++) {
            const dvec a = widen((const float*)&x + j * HALF);
            squares[j] += a * a;
            products[j] += a * widen((const float*)&q + j * HALF);
          }
        }
        for (int j = 0; j < 2; j++) yy[r][j] = squares[j], yq[r][j] = products[j];
      }
      for (int h = BLOCK / 2; h; h /= 2)
        for (int i = 0; i < h; i++)
          for (int j = 0; j < 2; j++) yy[i][j] += yy[i + h][j], yq[i][j] += yq[i + h][j];
      half_vec factors[2];
      for (int j = 0; j < 2; j++) {
        const dvec ratio = yy[0][j] * (double)g.encode / yq[0][j];
        factors[j] = __builtin_convertvector(yq[0][j] > 0.0 ? ratio : dvec{} + 1.0, half_vec);
      }
      vec group;
      memcpy(&group, factors, sizeof group);
      uvec columns;
      for (int i = 0; i < LANES; i++) columns[i] = (uint32_t)places[c + i];
      for (int64_t b = 0; b < blocks; b++) {
        const uvec noise = random.draw(first_block + row % of_one / BLOCK + b, columns);
        const vec units =
            drawn_units(of[b].scales, group, of[b].bad, (const int32_t*)&noise, g);
        for (int64_t r = b * BLOCK; r < (b + 1) * BLOCK; r++)
          store(at + r * ld, load(values + r * LANES) * units);
      }
    }
  }
}
}  // namespace nvfp4
EXACT_END
