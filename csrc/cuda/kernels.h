// The kernels, each the work of one block: of a row, of some columns, of a unit of a loss.
#pragma once
#include "coefficients.h"
#include "gradient.h"
#include "statistics.h"

namespace align_cuda {

constexpr int kThreads = 448;       // of the primitives: two blocks leave 72 registers a thread, and nothing spills
constexpr int kFusedThreads = 640;  // one block fills a multiprocessor: its shared memory holds a row

template <class T, bool kPlain>
ALIGN_FN void forward_row(Block<kThreads>& block, const Logits& in, State* state, int64_t index) {
  const Row<T, kPlain> row(in, index);
  const State made =
      statistics<kThreads, 2>(block, row, state[index], in.offset, [](int, const typename Row<T, kPlain>::Raw&) {});
  block.each([&](int thread) {
    if (thread == 0) state[index] = made;
  });
}

template <class T, class U, bool kPlain, bool kBare>
ALIGN_FN void backward_row(Block<kThreads>& block, const Logits& in, const Gradient& grad, int64_t index) {
  using R = Row<T, kPlain>;
  const R row(in, index);
  const RowGradient& g = block.template once<RowGradient>([&] {
    const double g_entropy = grad.g_entropy ? grad.g_entropy[index] : 0.0;
    return row_gradient<kBare>(row, grad.state[index], grad.g_logp[index], g_entropy, grad.out);
  });
  const Writer<U, kBare, R> writer(row, g, grad.out, index);
  block.each([&](int thread) {
    row.template visit<kThreads, 2>(
        thread, [&](int slot, const typename R::Raw& raw, int count) { writer.write(slot, raw, count); });
  });
}

// Statistics, coefficient and gradient of a row, its first `room` packs kept in `shared` between the two passes.
template <class T, class U, bool kPlain, bool kBare>
ALIGN_FN void token_loss_row(
    Block<kFusedThreads>& block, const Logits& in, State* state, const Out& out, const TokenLoss& loss, int64_t index,
    void* shared, int room) {
  using R = Row<T, kPlain>;
  const R row(in, index);
  auto* kept = static_cast<typename R::Raw*>(shared);
  const State whole = statistics<kFusedThreads, 2>(
      block, row, state[index], in.offset, [&](int slot, const typename R::Raw& raw) {
        if (slot < room) kept[slot] = raw;
      });
  const RowGradient& g = block.template once<RowGradient>([&] {
    const double log_sum = log(whole.sum), scale = *loss.scale;
    const Coefficient c = token_coefficient(
        loss, index, whole.target - whole.max - log_sum, log_sum - whole.sum_x / whole.sum);
    state[index] = whole;
    loss.value[index] = float(c.value);
    for (int i = 0; i < 4; i++) loss.metrics[i * in.rows + index] = float(c.metrics[i]);
    return row_gradient<kBare>(row, whole, scale * c.g, scale * c.g_entropy, out);
  });
  const Writer<U, kBare, R> writer(row, g, out, index);
  block.each([&](int thread) {
    const auto write = [&](int slot, const typename R::Raw& raw, int count) { writer.write(slot, raw, count); };
    // what was read last is likeliest still in the L2 cache
    ALIGN_ROLLED
    for (int slot = thread + (row.packs - 1 - thread) / kFusedThreads * kFusedThreads; slot >= 0 && row.packs > thread;
         slot -= kFusedThreads)
      write(slot, slot < room ? kept[slot] : row.load(slot), R::N);
    row.visit_ends(thread, write);
  });
}

// A row as `peaks` sees it: log p = x k - lse.
struct PeakRow {
  float k, lse;
  int64_t row;
};

template <class T, bool kPlain>
ALIGN_FN void peaks_columns(Block<kThreads>& block, const Logits& in, const Peaks& peaks, int64_t index) {
  PeakRow* rows = block.template board<PeakRow>();
  typename Block<kThreads>::template Each<float> top;
  block.each([&](int thread) { top[thread] = -INFINITY; });
  for (int64_t begin = 0; begin < peaks.count; begin += kThreads) {
    const int count = int(peaks.count - begin < kThreads ? peaks.count - begin : kThreads);
    block.each([&](int thread) {
      if (thread >= count) return;
      const int64_t i = peaks.rows[begin + thread];
      const State& state = peaks.state[i];
      rows[thread] = {float(Row<T, kPlain>(in, i).k), float(state.max + log(state.sum)), i};
    });
    block.sync();
    block.each([&](int thread) {
      const int64_t column = index * kThreads + thread;
      if (column >= in.cols) return;
      float best = top[thread];
      for (int j = 0; j < count; j++) {
        const float v = Row<T, kPlain>(in, rows[j].row).x_at(int(column)) * rows[j].k - rows[j].lse;
        best = v > best || v != v ? v : best;  // a NaN comes out
      }
      top[thread] = best;
    });
    block.sync();
  }
  block.each([&](int thread) {
    const int64_t column = index * kThreads + thread;
    if (column < in.cols) peaks.out[column] = top[thread];
  });
}

ALIGN_FN void unit_loss_unit(Block<kThreads>& block, const UnitLoss& loss, int64_t unit) {
  typename Block<kThreads>::template Each<UnitSums> sums;
  const int64_t other = loss.kind == Unit::kto ? -1 : loss.units + unit;
  block.each([&](int thread) {
    UnitSums mine{0, 0, 0, 0};
    for (int64_t i = thread; i < loss.rows; i += kThreads) {
      const int64_t place = loss.place[i];
      if (place != unit && place != other) continue;
      const State& state = loss.state[i];
      const double logp = state.target - state.max - log(state.sum);
      (place == unit ? mine.chosen : mine.rejected) += logp;
      (place == unit ? mine.chosen_rows : mine.rejected_rows) += 1;
    }
    sums[thread] = mine;
  });
  auto add = [](UnitSums a, UnitSums b) {
    return UnitSums{a.chosen + b.chosen, a.rejected + b.rejected, a.chosen_rows + b.chosen_rows,
                    a.rejected_rows + b.rejected_rows};
  };
  const UnitSums* parts = block.warps(sums, add);
  const UnitCoefficient& c = block.template once<UnitCoefficient>([&] {
    UnitSums whole = parts[0];
    ALIGN_ROLLED
    for (int i = 1; i < Block<kThreads>::kWarps; i++) whole = add(whole, parts[i]);
    UnitCoefficient made = unit_coefficient(loss, unit, whole);
    loss.value[unit] = float(made.value);
    if (loss.metrics)
      for (int i = 0; i < 4; i++) loss.metrics[i * loss.units + unit] = float(made.metrics[i]);
    made.chosen *= *loss.scale, made.rejected *= *loss.scale;
    return made;
  });
  block.each([&](int thread) {
    for (int64_t i = thread; i < loss.rows; i += kThreads) {
      const int64_t place = loss.place[i];
      if (place == unit || place == other) loss.g[i] = float(place == unit ? c.chosen : c.rejected);
    }
  });
}

}  // namespace align_cuda
