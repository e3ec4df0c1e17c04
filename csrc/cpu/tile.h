// The primitives on a tile of logits. No torch header: raw pointers and sizes, checked in tile.cpp.
#pragma once
#include <cstdint>

#include "../logits.h"
#include "lists.h"
#include "storage.h"

namespace align {

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

// One instruction set: the primitives on columns begin .. end (at most kBlock) of one row, and what lists take.
struct Isa {
  const char* name;
  State (*forward)(const Logits&, int64_t row, int64_t begin, int64_t end);
  float (*peak)(const Logits&, int64_t row, int64_t begin, int64_t end);
  State (*exponentials)(const Logits&, const Exponentials&, int64_t row, int64_t begin, int64_t end);
  void (*backward)(const Logits&, const Gradient&, int64_t row, int64_t begin, int64_t end);
  void (*survey)(const Logits&, const Survey&, int64_t i);  // row i of the survey's
  void (*keep)(const Logits&, const Keep&, int64_t i, int64_t begin, int64_t end);
  void (*combine)(const Combination&);
};

extern const Isa baseline_isa;
#ifdef __x86_64__
extern const Isa avx2_isa, avx512_isa;
#endif

// All of these raise std::invalid_argument.
void forward(const Logits&, State* state, int threads);
void exponentials(const Logits&, State* state, const Exponentials&, int threads);
void backward(const Logits&, const Gradient&, int threads);
bool check(const Logits&, const State*, int threads);  // whether there is anything to do
bool check(const Logits&, const Gradient&, int threads);

void merge(State& into, State part);  // the sums of other columns
const Isa& isa();                     // in use
void set_isa(const char* name);
const Isa* const* available_isas();  // ascending, ends with null

}  // namespace align
