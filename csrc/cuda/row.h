// One row of logits: the head's transform, and the cut into packs of 16 bytes.
#pragma once
#include "portable.h"
#include "tile.h"

namespace align_cuda {

constexpr double kLn2 = 0.693147180559945309417232121458;
constexpr float kLeast = -1e30f;  // stands for -inf where a product with 0 must be 0

// x is the row before the last factor: logit = x * k2 * ln(2), k2 > 0. Without bias and softcap, at a positive scale
// (kPlain), x is z itself.
//
// Columns are cut into slots: slot 0 .. packs - 1 are whole aligned packs, slot -1 the columns before them and slot
// `packs` those behind; both may be empty.
template <class T, bool kPlain>
struct Row {
  static constexpr int N = int(16 / sizeof(T));
  using Raw = Pack<T, N>;

  const T* z;
  int cols, before, packs;
  int target;  // column of this tile, negative or >= cols where it lies elsewhere
  const float* bias;
  float scale, cap, inverse_cap, k2;
  double k, chain;  // d(logit)/dz = chain, times the softcap's slope

  ALIGN_FN Row(const Logits& in, int64_t row) {
    z = static_cast<const T*>(in.z) + (in.index ? in.index[row] : row) * in.stride;
    cols = int(in.cols);
    before = int((16 - reinterpret_cast<uintptr_t>(z) % 16) % 16 / sizeof(T));
    before = before < cols ? before : cols;
    packs = (cols - before) / N;
    int64_t column = in.targets[row] - in.offset;
    target = column >= 0 && column < in.cols ? int(column) : -1;
    bias = in.bias;
    double temperature = in.row_temperature ? double(in.row_temperature[row]) : in.temperature;
    scale = float(in.scale), cap = float(in.softcap), inverse_cap = float(in.softcap > 0 ? 1 / in.softcap : 0);
    k2 = float((kPlain ? in.scale : 1) / (temperature * kLn2));
    k = double(k2) * kLn2;
    chain = in.scale / temperature;
  }

  ALIGN_FN int first(int slot) const { return slot < 0 ? 0 : before + slot * N; }
  ALIGN_FN int size(int slot) const { return slot < 0 ? before : slot < packs ? N : cols - first(slot); }
  ALIGN_FN int slot_of(int column) const { return column < before ? -1 : (column - before) / N; }

  ALIGN_FN float x(float raw, int column) const {
    if constexpr (kPlain) return raw;
    float shaped = (bias ? raw + bias[column] : raw) * scale;
    return cap > 0 ? cap * tanhf(shaped * inverse_cap) : shaped;
  }
  ALIGN_FN float x_at(int column) const { return x(widen(z[column]), column); }

  // d(x)/d((z + bias) scale): 1 - tanh^2 without cancellation
  ALIGN_FN float slope(float raw, int column) const {
    if (kPlain || !(cap > 0)) return 1.0f;
    float shaped = (bias ? raw + bias[column] : raw) * scale;
    float w = exp2_fast(fabsf(shaped * inverse_cap) * float(-2 / kLn2)), inverse = 1.0f / (1.0f + w);
    return 4.0f * w * inverse * inverse;
  }

  ALIGN_FN Raw load(int slot) const { return load_pack<Raw>(z + first(slot)); }

  // A slot at either end, its missing lanes -inf: columns without probability.
  ALIGN_FN Raw load_part(int slot) const {
    Raw raw;
    const int begin = first(slot), count = size(slot);
    ALIGN_UNROLL
    for (int i = 0; i < N; i++) {
      if (i < count)
        raw.lane[i] = z[begin + i];
      else
        narrow(-INFINITY, raw.lane[i]);
    }
    return raw;
  }

  // Every slot of one thread: visit(slot, raw, count), kUnroll loads in flight.
  template <int kThreads, int kUnroll, class Visit>
  ALIGN_FN void visit(int thread, Visit visit) const {
    ALIGN_ROLLED
    for (int slot = thread; slot < packs; slot += kUnroll * kThreads) {
      Raw raw[kUnroll];
      ALIGN_UNROLL
      for (int i = 0; i < kUnroll; i++)
        if (slot + i * kThreads < packs) raw[i] = load(slot + i * kThreads);
      ALIGN_UNROLL
      for (int i = 0; i < kUnroll; i++)
        if (slot + i * kThreads < packs) visit(slot + i * kThreads, raw[i], N);
    }
    visit_ends(thread, visit);
  }

  template <class Visit>
  ALIGN_FN void visit_ends(int thread, Visit visit) const {
    const int slot = thread == 0 ? -1 : packs;
    if (thread < 2 && size(slot) > 0) visit(slot, load_part(slot), size(slot));
  }
};

}  // namespace align_cuda
