// The primitives on one block of columns, for the instruction set that the including file is compiled for.
//
// Everything here has internal linkage and nothing comes from C++ library templates: an inline function of the standard
// library, compiled here with AVX-512, could be the copy that the linker keeps for the whole module.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "tile.h"

namespace align {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int W = kVectorBytes / 4;

typedef float F __attribute__((vector_size(kVectorBytes)));
typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
typedef int32_t I __attribute__((vector_size(kVectorBytes)));
typedef uint16_t H __attribute__((vector_size(kVectorBytes / 2)));

#define INLINE inline __attribute__((always_inline))

INLINE F all(float x) { return F{} + x; }
// A NaN in the second operand comes out, one in the first does not: the order of the arguments matters.
INLINE F min(F a, F b) { return a < b ? a : b; }
INLINE F max(F a, F b) { return a > b ? a : b; }

// -- memory: `count` is W, or less at the end of a row ---------------------------------------------------------------
INLINE F widen(H h) { return (F)(__builtin_convertvector(h, U) << 16); }

INLINE H narrow(F x) {  // round to nearest even
  U u = (U)x;
  U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector((U)(x == x ? (I)rounded : I{} + 0x7fc0), H);
}

INLINE F load(const float* p, int64_t count) {
  F v{};
  memcpy(&v, p, count == W ? sizeof v : size_t(count) * sizeof *p);
  return v;
}
INLINE F load(const uint16_t* p, int64_t count) {
  H h{};
  memcpy(&h, p, count == W ? sizeof h : size_t(count) * sizeof *p);
  return widen(h);
}
INLINE void store(float* p, F v, int64_t count) { memcpy(p, &v, count == W ? sizeof v : size_t(count) * sizeof *p); }
INLINE void store(uint16_t* p, F v, int64_t count) {
  H h = narrow(v);
  memcpy(p, &h, count == W ? sizeof h : size_t(count) * sizeof *p);
}

// step(first index, number of elements) over n elements
template <class Step>
INLINE void sweep(int64_t n, Step step) {
  int64_t i = 0;
  for (; i + W <= n; i += W) step(i, int64_t(W));
  if (i < n) step(i, n - i);
}

// -- functions -------------------------------------------------------------------------------------------------------
// exp, after Cephes: 2^n exp(r), |r| <= ln(2) / 2. Below -87.34 the result is 0, above 88.03 infinite; NaN stays NaN.
// The argument lies in [kLowest, kHighest].
constexpr float kLowest = -88.0f, kHighest = 89.0f;

INLINE F exp_in_range(F x) {
  const float kShift = 12582912.0f + 127.0f;  // 1.5 * 2^23: the low bits of x + kShift hold round(x) + 127
  F shifted = x * 1.44269504088896341f + kShift;
  F n = shifted - kShift;
  F r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  F p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r;
  F power = (F)((U)shifted << 23);
  return (p + 1.0f) * power;
}

// tanh(u) and its derivative, both accurate to a few ulp at both ends.
struct Tanh {
  F value, slope;
};

INLINE Tanh tanh_and_slope(F u) {
  F magnitude = (F)((U)u & 0x7fffffffu);
  F w = exp_in_range(max(all(kLowest), magnitude * -2.0f));
  F inverse = 1.0f / (1.0f + w);
  F large = (1.0f - w) * inverse;
  large = (F)((U)large | ((U)u & 0x80000000u));
  F square = u * u;
  F p = all(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square + -5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square + -3.33332819422e-1f;
  F small = u + u * (square * p);
  return {magnitude < 0.625f ? small : large, 4.0f * w * inverse * inverse};
}

// -- the head's transform --------------------------------------------------------------------------------------------
// The logits of the block are k * x[i], and d(logit)/dz is chain, times slope[i] where there is a softcap.
struct Block {
  const float* x;
  float k, chain;
  const float* slope;
};

struct alignas(64) Scratch {
  float x[kBlock], slope[kBlock];
};

template <class T>
INLINE Block prepare_from(const T* z, const Logits& in, int64_t row, int64_t begin, int64_t n, Scratch& scratch) {
  double temperature = in.row_temperature ? in.row_temperature[row] : in.temperature;
  if (!in.bias && in.softcap == 0 && in.scale > 0) {  // order is kept, so that the max of x is the max of the logits
    float k = float(in.scale / temperature);
    if constexpr (sizeof(T) == sizeof(float)) return {z, k, k, nullptr};
    sweep(n, [&](int64_t i, int64_t count) { store(scratch.x + i, load(z + i, count), count); });
    return {scratch.x, k, k, nullptr};
  }
  float k = float(1 / temperature), scale = float(in.scale), chain = float(in.scale / temperature);
  sweep(n, [&](int64_t i, int64_t count) {
    F x = load(z + i, count);
    if (in.bias) x += load(in.bias + begin + i, count);
    store(scratch.x + i, x * scale, count);
  });
  if (in.softcap == 0) return {scratch.x, k, chain, nullptr};
  float cap = float(in.softcap), inverse_cap = float(1 / in.softcap);
  sweep(n, [&](int64_t i, int64_t count) {
    Tanh t = tanh_and_slope(load(scratch.x + i, count) * inverse_cap);
    store(scratch.x + i, t.value * cap, count);
    store(scratch.slope + i, t.slope, count);
  });
  return {scratch.x, k, chain, scratch.slope};
}

INLINE Block prepare(const Logits& in, int64_t row, int64_t begin, int64_t n, Scratch& scratch) {
  int64_t first = (in.index ? in.index[row] : row) * in.stride + begin;
  if (in.storage == Storage::f32)
    return prepare_from(static_cast<const float*>(in.z) + first, in, row, begin, n, scratch);
  return prepare_from(static_cast<const uint16_t*>(in.z) + first, in, row, begin, n, scratch);
}

// -- forward ---------------------------------------------------------------------------------------------------------
// The largest of n numbers; NaN is passed over (the sums find it), -inf if nothing else is there.
INLINE float largest(const float* x, int64_t n) {
  F a = all(-INFINITY), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    a = max(load(x + i, W), a);
    b = max(load(x + i + W, W), b);
    c = max(load(x + i + 2 * W, W), c);
    d = max(load(x + i + 3 * W, W), d);
  }
  for (; i + W <= n; i += W) a = max(load(x + i, W), a);
  a = max(max(a, b), max(c, d));
  float top = -INFINITY;
  for (int lane = 0; lane < W; lane++) top = a[lane] > top ? a[lane] : top;
  for (; i < n; i++) top = x[i] > top ? x[i] : top;
  return top;
}

// The first index of `value`, n if it is absent.
INLINE int64_t first_index(const float* x, int64_t n, float value) {
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    I hit = (load(x + i, W) == value) | (load(x + i + W, W) == value) | (load(x + i + 2 * W, W) == value) |
            (load(x + i + 3 * W, W) == value);
    uint64_t words[kVectorBytes / 8], any = 0;
    memcpy(words, &hit, sizeof hit);
    for (uint64_t word : words) any |= word;
    if (any) break;
  }
  while (i < n && x[i] != value) i++;
  return i;
}

struct Sums {
  F sum{}, sum_x{}, sum_sq{}, total{};

  INLINE F add(F x, float k, float m) {
    F d = max(all(kLowest), x * k - m);  // exp(kLowest) is 0, so that a logit of -inf adds 0 and not 0 * inf
    F e = exp_in_range(d);
    sum += e;
    sum_x += e * d;
    sum_sq += e * e;
    total += x;
    return e;
  }
  INLINE void add(const Sums& other) {
    sum += other.sum;
    sum_x += other.sum_x;
    sum_sq += other.sum_sq;
    total += other.total;
  }
  INLINE void fold_into(State& state, int64_t lanes) const {
    for (int64_t i = 0; i < lanes; i++) {
      state.sum += sum[i];
      state.sum_x += sum_x[i];
      state.sum_sq += sum_sq[i];
      state.total += total[i];
    }
  }
};

// A logit as the vectors see it: with a fused multiply-add k * x - m has the exact product, else the rounded one.
INLINE double product(float k, float x) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return double(k) * x;
#else
  return double(k * x);
#endif
}

// The sums of a block, relative to its largest logit in double. Exponentials are made relative to `reference`, or to the
// largest logit as a float where that is not finite; keep(i, e, count) gets exp(l - reference) of the elements
// i .. i + count, each once.
template <class Keep>
INLINE State sums_of(const Logits& in, int64_t row, int64_t begin, int64_t n, const Block& block, float reference,
                     Keep keep) {
  const float *x = block.x, k = block.k;
  const float peak = largest(x, n), m = peak * k;
  const bool finite = m - m == 0.0f;
  if (!(reference > -INFINITY)) reference = m == -INFINITY ? 0.0f : m;
  const int64_t first = first_index(x, n, peak);

  State state{};
  int64_t target = in.targets[row] - in.offset - begin;
  if (target >= 0 && target < n) state.target = product(k, x[target]);  // before `keep` writes over it
  state.argmax = first < n ? double(in.offset + begin + first) : -1;  // -1: all NaN
  // The vector that holds the max is added lane by lane in double, and the max itself is exp(0): with p -> 1 the sum is
  // 1 + a little, and a float accumulator, or a float product k * x, would lose the little, which is the whole gradient
  // of the row.
  const int64_t whole = n / W * W, top = first / W * W;
  auto add_alone = [&](int64_t i, int64_t lanes) {
    Sums alone;
    keep(i, alone.add(load(x + i, lanes), k, reference), lanes);
    const int64_t lane = first - i;
    if (finite && lane >= 0 && lane < lanes) alone.sum[lane] = alone.sum_x[lane] = alone.sum_sq[lane] = 0.0f;
    alone.fold_into(state, lanes);
  };
  Sums body;
  auto add_vectors = [&](int64_t from, int64_t to) {  // in strips: the error grows with a strip and their number
    constexpr int64_t kStrip = 32 * W;
    for (int64_t strip = from; strip < to; strip += kStrip) {
      int64_t strip_end = strip + kStrip < to ? strip + kStrip : to;
      Sums part;
      for (int64_t i = strip; i < strip_end; i += W) keep(i, part.add(load(x + i, W), k, reference), int64_t(W));
      body.add(part);
    }
  };
  if (top < whole) {
    add_vectors(0, top);
    add_alone(top, W);
    add_vectors(top + W, whole);
  } else {
    add_vectors(0, whole);
  }
  body.fold_into(state, W);
  if (whole < n) add_alone(whole, n - whole);
  state.total *= k;
  state.max = m;
  if (!finite) return state;
  state.max = product(k, peak);
  if (state.sum != 0) {
    const double shift = reference - state.max, factor = shift == 0 ? 1.0 : exp(shift);
    state.sum_x = (state.sum_x + shift * state.sum) * factor;
    state.sum_sq *= factor * factor;
    state.sum *= factor;
  }
  state.sum += 1.0;
  state.sum_sq += 1.0;
  return state;
}

State forward_block(const Logits& in, int64_t row, int64_t begin, int64_t end) {
  Scratch scratch;
  Block block = prepare(in, row, begin, end - begin, scratch);
  return sums_of(in, row, begin, end - begin, block, -INFINITY, [](int64_t, F, int64_t) {});
}

float peak_block(const Logits& in, int64_t row, int64_t begin, int64_t end) {
  Scratch scratch;
  Block block = prepare(in, row, begin, end - begin, scratch);
  return largest(block.x, end - begin) * block.k;
}

template <class T>
INLINE State exponentials_into(T* out, const Logits& in, int64_t row, int64_t begin, int64_t n,
                               float reference) {
  Scratch scratch;
  Block block = prepare(in, row, begin, n, scratch);
  State state = sums_of(in, row, begin, n, block, reference, [&](int64_t i, F e, int64_t count) {
    store(out + i, e, count);
  });
  int64_t target = in.targets[row] - in.offset - begin;
  if (target >= 0 && target < n) store(out + target, F{}, 1);
  return state;
}

State exponentials_block(const Logits& in, const Exponentials& to, int64_t row, int64_t begin, int64_t end) {
  int64_t first = row * to.stride + begin, n = end - begin;
  float reference = to.reference[row];
  if (to.storage == Storage::f32)
    return exponentials_into(static_cast<float*>(to.out) + first, in, row, begin, n, reference);
  return exponentials_into(static_cast<uint16_t*>(to.out) + first, in, row, begin, n, reference);
}

// -- backward --------------------------------------------------------------------------------------------------------
template <class T>
INLINE void backward_into(T* out, const Logits& in, const Gradient& grad, int64_t row, int64_t begin, int64_t n) {
  Scratch scratch;
  Block block = prepare(in, row, begin, n, scratch);
  const float *x = block.x, *slope = block.slope;
  const State& state = grad.state[row];
  const float k = block.k, m = float(state.max);
  const double inverse_sum = exp(m - state.max) / state.sum;  // p = inverse_sum * exp(l - m), m rounded to float
  const double g = grad.g_logp[row], g_entropy = grad.g_entropy ? grad.g_entropy[row] : 0.0;
  const double mean_x = state.sum_x / state.sum;  // l - lse + H = (l - max) - mean_x
  const double limit = grad.limit_is_residual ? fabs(g) * grad.limit : grad.limit;

  // a target in this block is handled apart, in double: 1 - p has no cancellation there
  int64_t target = in.targets[row] - in.offset - begin;
  bool here = target >= 0 && target < n;
  double at_target = 0;
  if (here) {
    double d = state.target - state.max, log_p = d - log(state.sum), p = exp(log_p);
    at_target = -g * expm1(log_p);
    if (p > grad.prob_above || grad.prob_above == 0)  // fmin and fmax would drop a NaN
      at_target = at_target > limit ? limit : at_target < -limit ? -limit : at_target;
    if (grad.g_entropy) at_target -= g_entropy * p * (d - mean_x);
    at_target *= block.chain * (slope ? double(slope[target]) : 1.0);
  }

  if (limit == INFINITY && !grad.g_entropy && !slope) {
    const float c = float(-g * inverse_sum * block.chain);
    sweep(n, [&](int64_t i, int64_t count) {
      F d = min(all(kHighest), max(all(kLowest), load(x + i, count) * k - m));
      store(out + i, exp_in_range(d) * c, count);
    });
  } else {
    const float scale_p = float(inverse_sum), minus_g = float(-g), above = float(grad.prob_above);
    const float high = float(limit), minus_g_entropy = float(-g_entropy), mean = float(mean_x + (state.max - m));
    sweep(n, [&](int64_t i, int64_t count) {
      F d = min(all(kHighest), max(all(kLowest), load(x + i, count) * k - m));
      F p = exp_in_range(d) * scale_p;
      F v = p * minus_g;
      F clipped = max(all(-high), min(all(high), v));
      v = p > above ? clipped : v;
      v += minus_g_entropy * p * (d - mean);
      v *= block.chain;
      if (slope) v *= load(slope + i, count);
      store(out + i, v, count);
    });
  }
  if (here) store(out + target, all(float(at_target)), 1);
}

void backward_block(const Logits& in, const Gradient& grad, int64_t row, int64_t begin, int64_t end) {
  int64_t first = row * grad.stride + begin, n = end - begin;
  if (grad.storage == Storage::f32)
    backward_into(static_cast<float*>(grad.out) + first, in, grad, row, begin, n);
  else
    backward_into(static_cast<uint16_t*>(grad.out) + first, in, grad, row, begin, n);
}

}  // namespace
}  // namespace align
