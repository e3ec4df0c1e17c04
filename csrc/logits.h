// What every extension takes of a tile of logits. No torch and no CUDA header.
//
//   logit = softcap(scale * (z + bias)) / temperature        softcap(x) = cap * tanh(x / cap), or x when cap is 0
#pragma once
#include <stdint.h>

namespace align {

// How numbers lie in memory; the CPU serves f32 and bf16.
enum class Storage : int { f32 = 0, bf16 = 1, f16 = 2 };

// What has been seen of one row's softmax: a row of the float64 [n, 8] state tensor (align_kernels/backends/state.py).
struct State {
  double max;     // m, the largest logit; NaN once a NaN was seen
  double sum;     // sum of exp(l - m)
  double sum_x;   // sum of exp(l - m) (l - m)
  double sum_sq;  // sum of exp(l - m)^2
  double total;   // sum of l
  double target;  // the target's logit
  double argmax;  // first index of the max over the whole vocabulary, -1 before any column
  double unused;
};
static_assert(sizeof(State) == 64, "one row of the state tensor");

// Some rows of raw logits z [height, cols] with the columns offset .. offset + cols of the vocabulary, and the head's
// transform: row i of `rows` is the one at index[i].
struct Logits {
  const void* z;
  Storage storage;
  int64_t rows, cols, stride;
  const int64_t* targets;  // [rows], ids of the whole vocabulary
  int64_t offset, vocab;
  const float* bias;  // [cols] or null
  double scale, softcap, temperature;
  const float* row_temperature;  // [rows] or null; replaces temperature
  int64_t height;
  const int64_t* index;  // [rows], or null where they are all of z in turn
};

// Largest log-probs of columns over some rows.
struct Peaks {
  const State* state;   // [logits' rows], finished over the whole vocabulary
  const int64_t* rows;  // [count]
  int64_t count;
  float* out;  // [cols]
};

}  // namespace align
