// dL/dz of one row: g (1[v = y] - p), clamped where asked, minus g_H p (l - lse + H), through softcap and scale.
#pragma once
#include "block.h"
#include "row.h"

namespace align_cuda {

// What a row's columns share. p = share * exp2((x - reference) k2).
struct RowGradient {
  float reference, share, minus_g, minus_g_entropy, mean, chain, high, above, factor, at_target;
};

// kBare: there is neither a clamp nor a gradient of the entropy, and no logit pays for them.
template <bool kBare, class R>
ALIGN_FN RowGradient row_gradient(const R& row, const State& state, double g, double g_entropy, const Out& out) {
  RowGradient made;
  made.reference = float(state.max / row.k);
  const double reference = double(made.reference) * row.k, share = exp(reference - state.max) / state.sum;
  const double mean_x = state.sum_x / state.sum;  // l - lse + H = (l - max) - mean_x
  const double limit = out.limit_is_residual ? fabs(g) * out.limit : out.limit;
  made.share = float(share), made.minus_g = float(-g), made.chain = float(row.chain);
  made.factor = float(-g * share * row.chain);
  made.high = float(limit), made.above = out.prob_above == 0 ? -1.0f : float(out.prob_above);  // below 0: every p
  made.minus_g_entropy = float(-g_entropy * kLn2);
  made.mean = float((mean_x + state.max - reference) / kLn2);
  made.at_target = 0;
  if (row.target >= 0) {  // in double: 1 - p has no cancellation there
    const double d = state.target - state.max, log_p = d - log(state.sum), p = exp(log_p);
    double v = -g * expm1(log_p);
    if (!kBare) {
      if (p > out.prob_above || out.prob_above == 0)  // fmin and fmax would drop a NaN
        v = v > limit ? limit : v < -limit ? -limit : v;
      v -= g_entropy * p * (fmax(d, double(kLeast)) - mean_x);
    }
    made.at_target = float(v * row.chain * row.slope(widen(row.z[row.target]), row.target));
  }
  return made;
}

template <class T, bool kBare, class R>
struct Writer {
  const R& row;
  const RowGradient& g;
  T* out;
  bool whole;  // packs of the gradient are aligned too

  ALIGN_FN Writer(const R& row, const RowGradient& g, const Out& out, int64_t index)
      : row(row), g(g), out(static_cast<T*>(out.out) + index * out.stride) {
    whole = aligned<Pack<T, R::N>>(this->out + row.before);
  }

  ALIGN_FN float value(float raw, int column) const {
    const float d = (row.x(raw, column) - g.reference) * row.k2;
    const float e = exp2_fast(d), slope = row.slope(raw, column);
    if constexpr (kBare) return e * g.factor * slope;
    const float p = e * g.share;
    float v = p * g.minus_g;
    const float clipped = v > g.high ? g.high : v < -g.high ? -g.high : v;
    v = p > g.above ? clipped : v;
    v += g.minus_g_entropy * p * (fmaxf(d, kLeast) - g.mean);
    return v * g.chain * slope;
  }

  ALIGN_FN void write(int slot, const typename R::Raw& raw, int count) const {
    constexpr int N = R::N;
    const int begin = row.first(slot);
    Pack<T, N> pack;
    ALIGN_UNROLL
    for (int i = 0; i < N; i++) {
      if (i >= count) break;
      narrow(value(widen(raw.lane[i]), begin + i), pack.lane[i]);
    }
    if (unsigned(row.target - begin) < unsigned(N)) {
      ALIGN_UNROLL
      for (int i = 0; i < N; i++)
        if (begin + i == row.target) narrow(g.at_target, pack.lane[i]);
    }
    if (whole && count == N) {
      store_pack(out + begin, pack);
    } else {
      ALIGN_UNROLL
      for (int i = 0; i < N; i++)
        if (i < count) out[begin + i] = pack.lane[i];
    }
  }
};

}  // namespace align_cuda
