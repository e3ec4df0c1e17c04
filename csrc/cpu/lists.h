// Rows that keep few columns each: how they are chosen, and products over those columns alone. No torch header, as in
// tile.h; checked in lists.cpp.
#pragma once
#include <cstdint>

#include "../logits.h"
#include "storage.h"

namespace align {

struct Gradient;

// Of row t the entries begins[t] .. ends[t], columns ascending.
struct Lists {
  int64_t rows;
  const int64_t *begins, *ends;  // [rows]
  const int32_t* columns;
};

// Rows of `width` floats or bfloat16, `stride` apart.
struct Vectors {
  const void* data;
  Storage storage;
  int64_t stride, width;
};

// Some rows of a tile of logits, whose first column is `first` on this rank.
struct Some {
  const State* state;   // [logits' rows], finished over the whole vocabulary
  const int64_t* rows;  // [count]
  int64_t count, first;
};

// What a sample tells: every so many-th run of kRun columns. A row keeps p >= drop_mass / 2^(level / steps).
constexpr int64_t kRun = 16, kMostLevels = 126;
struct Survey {
  Some some;
  int64_t every;
  double drop_mass;
  int64_t steps, levels;
  double* sums;  // [count, levels + 2, 3]: columns, sum of p, sum of -p log p, by the level from which on they are kept
  const double* means = nullptr;  // [levels + 2, 3]: of a column, 1, p and -p log p; 0 for both of the first and the last
};

// Where a row's columns go whose log-prob reaches its floor, and its target.
struct Keep {
  Some some;
  const float* floors;            // [count]
  const int64_t *begins, *rooms;  // [count]: entries begin .. begin + room may be written
  int64_t* found;                 // [count]: entries so far, more than there is room for where they do not fit
  int32_t* columns;
  float* z;
};

// out [width] (+)= the sum of factors[i] times the strip of row index[i] - base in `packed`. The rows are `pitch` apart,
// and are zero from `width` to there.
struct Combination {
  const float* packed;
  int64_t pitch;
  const int32_t* index;
  int32_t base;
  const float* factors;
  int64_t count;
  float* out;
  int64_t width;
  bool add;
};
constexpr int64_t kLanes = 16;           // a pitch is a multiple of it
constexpr int64_t kStrip = 14 * kLanes;  // floats: 14 of the 16 or 32 registers sum one vector each

// No sum depends on the number of threads. All of these raise std::invalid_argument.
void survey(const Logits&, const Survey&, int threads);
void keep(const Logits&, const Keep&, int threads);
// As of tiles: z holds the lists' entries, bias all columns of this rank.
void forward(const Logits&, const Lists&, State* state, int threads);
void backward(const Logits&, const Lists&, const Gradient&, int threads);
// out[t] += the sum over t's columns v of its value times w[v - first], for the columns first .. first + count.
void pull(const Lists&, const float* values, const Vectors& w, int64_t first, int64_t count, float* out, int threads);
// out[v] (+)= the sum over the rows t that keep v of their value times x[t], for all `columns`.
void push(const Lists&, const float* values, const Vectors& x, int64_t columns, float* out, bool add, int threads);

}  // namespace align
