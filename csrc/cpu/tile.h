// The primitives on a tile of logits. No torch header: raw pointers and sizes, checked in tile.cpp.
//
//   logit = softcap(scale * (z + bias)) / temperature        softcap(x) = cap * tanh(x / cap), or x when cap is 0
#pragma once
#include <cstdint>

#include "storage.h"

namespace align {

// What has been seen of one row's softmax: a row of the float64 [n, 8] state tensor.
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

// Raw logits z [rows, cols] with the columns offset .. offset + cols of the vocabulary, and the head's transform.
struct Logits {
  const void* z;
  Storage storage;
  int64_t rows, cols, stride;
  const int64_t* targets;  // [rows], ids of the whole vocabulary
  int64_t offset, vocab;
  const float* bias;  // [cols] or null
  double scale, softcap, temperature;
  const float* row_temperature;  // [rows] or null; replaces temperature
};

// Where exp(l - reference) goes, 0 at the target.
struct Exponentials {
  float* reference;  // [rows], -inf before the first tile; moved up where a tile exceeds it by kHeadroom
  void* out;         // [rows, cols], may be z
  Storage storage;
  int64_t stride;
};
constexpr float kHeadroom = 20.0f;

// Where dL/dz goes and what it is made of.
struct Gradient {
  const State* state;      // [rows], finished over the whole vocabulary
  const float* g_logp;     // [rows]
  const float* g_entropy;  // [rows] or null
  double limit;            // of the clamp; +inf for no clamp
  double prob_above;
  bool limit_is_residual;  // else the limit bounds g * residual
  void* out;               // [rows, cols], may be z
  Storage storage;
  int64_t stride;
};

// Columns of one work item: its scratch stays in the first-level cache, and no sum depends on the number of threads.
constexpr int64_t kBlock = 2048;

// Largest log-probs of columns over some rows.
struct Peaks {
  const State* state;   // [logits' rows], finished over the whole vocabulary
  const int64_t* rows;  // [count]
  int64_t count;
  float* out;  // [cols]
};

// One instruction set: the primitives on columns begin .. end (at most kBlock), of one row or of the rows of `Peaks`.
struct Isa {
  const char* name;
  State (*forward)(const Logits&, int64_t row, int64_t begin, int64_t end);
  float (*peak)(const Logits&, int64_t row, int64_t begin, int64_t end);
  State (*exponentials)(const Logits&, const Exponentials&, int64_t row, int64_t begin, int64_t end);
  void (*backward)(const Logits&, const Gradient&, int64_t row, int64_t begin, int64_t end);
  void (*peaks)(const Logits&, const Peaks&, int64_t begin, int64_t end);
};

extern const Isa baseline_isa;
#ifdef __x86_64__
extern const Isa avx2_isa, avx512_isa;
#endif

// All of these raise std::invalid_argument.
void forward(const Logits&, State* state, int threads);
void exponentials(const Logits&, State* state, const Exponentials&, int threads);
void backward(const Logits&, const Gradient&, int threads);
void peaks(const Logits&, const Peaks&, int threads);
const char* isa_name();
void set_isa(const char* name);
const Isa* const* available_isas();  // ascending, ends with null

}  // namespace align
