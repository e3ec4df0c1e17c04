// The primitives on a tile of logits, and losses fused into them. No torch and no CUDA header: raw device pointers and
// sizes, checked in check.cpp. kernels.cu runs them on a GPU, emulate.cpp the same source on the CPU.
#pragma once
#include <stdint.h>

#include "../logits.h"

namespace align_cuda {

using align::Logits;
using align::Peaks;
using align::State;
using align::Storage;

// Where dL/dz goes and how it is clamped.
struct Out {
  void* out;  // [rows, cols], may be z
  Storage storage;
  int64_t stride;
  double limit;  // of the clamp; +inf for no clamp
  double prob_above;
  bool limit_is_residual;  // else the limit bounds g * residual
};

// What dL/dz is made of.
struct Gradient {
  const State* state;      // [rows], finished over the whole vocabulary
  const float* g_logp;     // [rows]
  const float* g_entropy;  // [rows] or null
  Out out;
};

// -- losses; their formulas stand in align_kernels/losses, one definition each, and coefficients.h equals them --------
enum class Token : int { sft = 0, ppo_clip = 1, grpo = 2 };

// A loss of single tokens: statistics, coefficient and dL/dz of a row in one kernel.
struct TokenLoss {
  Token kind;
  double epsilon_low, epsilon_high, delta, beta, entropy_coef;  // delta = +inf for none
  bool on_policy, kl_by_ratio;  // ratio 1; the KL times the ratio
  const float* old_logps;   // [rows], as the three below; null where the loss does not read it
  const float* advantages;
  const float* ref_logps;
  const float* weights;
  const double* scale;  // [1] factor of the sum over tokens
  float* value;        // [rows] the loss of each token before `scale`
  float* metrics;      // [4, rows]
};

enum class Unit : int { dpo_sigmoid = 0, dpo_robust = 1, dpo_hinge = 2, dpo_ipo = 3, kto = 4 };

// A loss of sequences or pairs: sums over their rows, then one coefficient per row.
struct UnitLoss {
  Unit kind;
  double beta, label_smoothing, desirable_weight, undesirable_weight;
  const State* state;    // [rows], finished
  const int64_t* place;  // [rows] sequence of each row; of a pair: chosen u, rejected units + u
  int64_t rows, units;
  const float* ref_logps;   // [sequences]
  const bool* desirable;    // [units], kto
  const float* kl;          // [units] or null, kto
  const double* scale;      // [1]
  float* value;             // [units] before `scale`
  float* metrics;           // [4, units], dpo
  float* g;                 // [rows]
};

struct Queue {
  int device;
  void* stream;
};

// Each queues one kernel and returns a cudaError_t.
int forward(const Logits&, State* state, Queue);
int backward(const Logits&, const Gradient&, Queue);
int peaks(const Logits&, const Peaks&, Queue);
// `shared` bytes of a row wait on the chip for its coefficient, the rest is read again; < 0: as many as there are.
int token_loss(const Logits&, State* state, const Out&, const TokenLoss&, int64_t shared, Queue);
int unit_loss(const UnitLoss&, Queue);

int device_count(int* count);
const char* error_name(int error);
const char* error_text(int error);

}  // namespace align_cuda
