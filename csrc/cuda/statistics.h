// The statistics of one row: every thread scans its slots in float against the largest x that it has met, and one thread
// folds what all found into the row's float64 state.
#pragma once
#include "block.h"
#include "row.h"

namespace align_cuda {

struct Best {
  float max;
  int slot;  // the first slot that holds it; INT_MAX: none
};

// Terms exp(l - m) of the columns that a thread met. Those at the max are counted and not added: in a confident row the
// rest is the whole gradient, and a float sum of 1 + rest would lose it.
struct Sums {
  float count, rest, sum_x, sum_sq, total;  // sum_x with l in units of log2, total of x
};

// Move sums that stand against `from` to the reference `to` >= from.
ALIGN_FN void shift(Sums& sums, float from, float to, float k2) {
  float by = fmaxf((fmaxf(from, -FLT_MAX) - fmaxf(to, -FLT_MAX)) * k2, kLeast), factor = exp2_fast(by);
  bool higher = to > from;
  sums.sum_x = (sums.sum_x + by * (sums.rest + sums.count)) * factor;
  sums.sum_sq = sums.sum_sq * factor * factor;
  sums.rest = higher ? (sums.rest + sums.count) * factor : sums.rest;
  sums.count = higher ? 0.0f : sums.count;
}

template <class R>
ALIGN_FN void scan(const R& row, Best& best, Sums& sums, int slot, const typename R::Raw& raw, int count) {
  constexpr int N = R::N;
  const int begin = row.first(slot);
  float x[N], top = -INFINITY, total = 0;
  ALIGN_UNROLL
  for (int i = 0; i < N; i++) {
    x[i] = i < count ? row.x(widen(raw.lane[i]), begin + i) : -INFINITY;
    total += i < count ? x[i] : 0.0f;
    top = fmaxf(top, x[i]);  // passes over NaN: the sums find it
  }
  const float max = fmaxf(best.max, top);
  shift(sums, best.max, max, row.k2);
  if (top > best.max || (top == best.max && slot < best.slot)) best = {top, slot};
  const float reference = fmaxf(max, -FLT_MAX);  // finite, so that -inf is an absent column
  float peaks = 0, rest = 0, sum_x = 0, sum_sq = 0;
  ALIGN_UNROLL
  for (int i = 0; i < N; i++) {
    const float d = (x[i] - reference) * row.k2, e = exp2_fast(d);
    const bool peak = x[i] == reference;
    peaks += peak ? 1.0f : 0.0f;
    rest += peak ? 0.0f : e;
    sum_x += e * fmaxf(d, kLeast);
    sum_sq += e * e;
  }
  sums.count += peaks, sums.rest += rest, sums.sum_x += sum_x, sums.sum_sq += sum_sq, sums.total += total;
}

// -- the float64 state -----------------------------------------------------------------------------------------------
ALIGN_FN void rescale(State& state, double max) {
  if (state.max == max || state.sum == 0) return;  // an empty sum has no max to shift
  double by = state.max - max, factor = exp(by);
  state.sum_x = factor == 0 ? factor * state.sum : (state.sum_x + by * state.sum) * factor;
  state.sum_sq *= factor * factor;
  state.sum *= factor;
}

ALIGN_FN State merge(State into, State part, bool has_target) {
  if (part.max > into.max || (part.max == into.max && (into.argmax < 0 || part.argmax < into.argmax)))
    into.argmax = part.argmax;
  double max = fmax(into.max, part.max);
  rescale(into, max);
  rescale(part, max);
  into.sum += part.sum;
  into.sum_x += part.sum_x;
  into.sum_sq += part.sum_sq;
  into.total += part.total;
  if (has_target) into.target = part.target;
  into.max = into.sum != into.sum ? into.sum : max;
  return into;
}

template <class R>
ALIGN_FN State part_of(const R& row, Best best, const Sums* warps, int count, int64_t offset) {
  State part{};
  ALIGN_ROLLED  // loads of all warps at once would take more registers than the rows' own loop
  for (int i = 0; i < count; i++) {
    part.sum += double(warps[i].count) + double(warps[i].rest);
    part.sum_x += warps[i].sum_x;
    part.sum_sq += warps[i].sum_sq;
    part.total += warps[i].total;
  }
  part.max = best.max * row.k;
  part.sum_x *= kLn2;
  part.total *= row.k;
  if (!(best.max < INFINITY)) part.sum = NAN;  // exp(inf - inf)
  if (best.slot == INT_MAX) {
    part.argmax = part.total != part.total ? -1.0 : double(offset);  // all NaN, or all -inf
  } else {
    const int begin = row.first(best.slot), size = row.size(best.slot);
    int column = begin;
    ALIGN_ROLLED
    for (int i = begin + 1; i < begin + size; i++)
      if (row.x_at(i) > row.x_at(column)) column = i;
    part.argmax = double(offset + column);
  }
  if (row.target >= 0) part.target = row.k * row.x_at(row.target);
  return part;
}

// The state of a row with this tile folded in. `keep(slot, raw)` sees every whole pack that is read.
template <int kThreads, int kUnroll, class R, class Keep>
ALIGN_FN State statistics(Block<kThreads>& block, const R& row, const State& before, int64_t offset, Keep keep) {
  using Threads = Block<kThreads>;
  typename Threads::template Each<Best> best;
  typename Threads::template Each<Sums> sums;
  block.each([&](int thread) {
    Best my_best{-INFINITY, INT_MAX};
    Sums my_sums{0, 0, 0, 0, 0};
    row.template visit<kThreads, kUnroll>(thread, [&](int slot, const typename R::Raw& raw, int count) {
      if (count == R::N) keep(slot, raw);
      scan(row, my_best, my_sums, slot, raw, count);
    });
    best[thread] = my_best, sums[thread] = my_sums;
  });
  const Best* bests = block.warps(best, [](Best a, Best b) {
    return a.max > b.max || (a.max == b.max && a.slot < b.slot) ? a : b;
  });
  typename Threads::template Each<Best> whole;
  block.each([&](int thread) {
    Best top = bests[0];
    ALIGN_ROLLED
    for (int i = 1; i < Threads::kWarps; i++)
      if (bests[i].max > top.max || (bests[i].max == top.max && bests[i].slot < top.slot)) top = bests[i];
    whole[thread] = top;
    shift(sums[thread], best[thread].max, top.max, row.k2);
  });
  const Sums* parts = block.warps(sums, [](Sums a, Sums b) {
    return Sums{a.count + b.count, a.rest + b.rest, a.sum_x + b.sum_x, a.sum_sq + b.sum_sq, a.total + b.total};
  });
  return block.template once<State>([&] {
    return merge(before, part_of(row, whole[0], parts, Threads::kWarps, offset), row.target >= 0);
  });
}

}  // namespace align_cuda
