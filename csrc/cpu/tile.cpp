// Checks, threads and the choice of the instruction set: the kernels behind it trust what they get.
#include "tile.h"

#include "../require.h"
#include "denormals.h"
#include "named.h"
#include "processor.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

namespace align {
namespace {

// -- instruction sets ------------------------------------------------------------------------------------------------
const std::vector<const Isa*>& isas() {
  static const std::vector<const Isa*> list = [] {
    std::vector<const Isa*> found{&baseline_isa};
#ifdef __x86_64__
    if (serves_avx2()) found.push_back(&avx2_isa);
    if (serves_avx512()) found.push_back(&avx512_isa);
#endif
    found.push_back(nullptr);
    return found;
  }();
  return list;
}

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa{isas()[isas().size() - 2]};
  return isa;
}

// -- checks ----------------------------------------------------------------------------------------------------------
template <class... Where>
void check_temperature(double temperature, const Where&... where) {
  require(std::isfinite(temperature) && temperature > 0, "temperature must be finite and > 0, got ", temperature,
          where...);
}

}  // namespace

bool check(const Logits& in, const State* state, int threads) {
  const int64_t n = in.rows, c = in.cols;
  check_storage("z", in.storage);
  require(n >= 0 && c >= 0, "z must have sizes >= 0, got ", n, " x ", c);
  require(in.offset >= 0 && c <= in.vocab && in.offset <= in.vocab - c,
          "columns offset .. offset + cols must lie in [0, vocab), got offset ", in.offset, ", cols ", c, ", vocab ",
          in.vocab);
  require(std::isfinite(in.scale), "scale must be finite, got ", in.scale);
  require(std::isfinite(in.softcap) && in.softcap >= 0, "softcap must be finite and > 0, got ", in.softcap);
  require(threads >= 1, "threads must be >= 1, got ", threads);
  if (!in.row_temperature) check_temperature(in.temperature);
  if (n == 0 || c == 0) return false;
  require(in.height == 1 || in.stride >= c, "z must have a row stride >= its ", c, " columns, got ", in.stride);
  check_pointer("z", in.z, size_of(in.storage));
  check_pointer("state", state, 8);
  check_pointer("targets", in.targets, 8);
  for (int64_t i = 0; i < n; i++)
    require(in.targets[i] >= 0 && in.targets[i] < in.vocab, "targets must lie in [0, ", in.vocab, "), got ",
            in.targets[i], " at row ", i);
  if (in.index) check_pointer("rows", in.index, 8);
  for (int64_t i = 0; in.index && i < n; i++)
    require(in.index[i] >= 0 && in.index[i] < in.height, "rows must lie in [0, ", in.height, "), got ", in.index[i]);
  if (in.bias) check_pointer("bias", in.bias, 4);
  if (in.row_temperature) {
    check_pointer("temperature", in.row_temperature, 4);
    for (int64_t i = 0; i < n; i++) check_temperature(in.row_temperature[i], " at row ", i);
  }
  return true;
}

bool check(const Logits& in, const Gradient& grad, int threads) {
  check_storage("out", grad.storage);
  require(grad.limit >= 0, "clamp limit must be >= 0, got ", grad.limit);
  require(grad.prob_above >= 0 && grad.prob_above <= 1, "clamp prob_above must lie in [0, 1], got ", grad.prob_above);
  if (!check(in, grad.state, threads)) return false;
  check_pointer("g_logp", grad.g_logp, 4);
  if (grad.g_entropy) check_pointer("g_entropy", grad.g_entropy, 4);
  return true;
}

namespace {

// The first address behind a tile of `rows` rows.
uintptr_t end_of(uintptr_t begin, int64_t rows, int64_t cols, int64_t stride, Storage storage) {
  return begin + uintptr_t(((rows - 1) * stride + cols) * size_of(storage));
}

// Where a primitive writes a tile.
template <class Out>
void check_out(const Logits& in, const Out& to) {
  require(in.rows == 1 || to.stride >= in.cols, "out must have a row stride >= its ", in.cols, " columns, got ",
          to.stride);
  check_pointer("out", to.out, size_of(to.storage));
  const auto z = reinterpret_cast<uintptr_t>(in.z), out = reinterpret_cast<uintptr_t>(to.out);
  const bool apart = end_of(out, in.rows, in.cols, to.stride, to.storage) <= z ||
                     end_of(z, in.height, in.cols, in.stride, in.storage) <= out;
  const bool same = z == out && in.storage == to.storage && (in.rows == 1 || in.stride == to.stride);
  require(apart || !in.index, "out must not overlap z where some of its rows are taken");
  require(apart || same, "out must be z itself or not overlap it");
}

bool check(const Logits& in, const State* state, const Exponentials& to, int threads) {
  check_storage("out", to.storage);
  require(in.softcap == 0, "exponentials serve no softcap, got ", in.softcap);
  if (!check(in, state, threads)) return false;
  check_out(in, to);
  check_pointer("reference", to.reference, 4);
  return true;
}

bool check_tile(const Logits& in, const Gradient& grad, int threads) {
  if (!check(in, grad, threads)) return false;
  check_out(in, grad);
  return true;
}

// -- the state -------------------------------------------------------------------------------------------------------
void rescale(State& state, double max) {
  if (state.max == max || state.sum == 0) return;  // an empty sum has no max to shift
  double shift = state.max - max, factor = std::exp(shift);
  state.sum_x = factor == 0 ? factor * state.sum : (state.sum_x + shift * state.sum) * factor;
  state.sum_sq *= factor * factor;
  state.sum *= factor;
}

}  // namespace

void merge(State& into, State part) {
  if (part.max > into.max || (part.max == into.max && (into.argmax < 0 || part.argmax < into.argmax)))
    into.argmax = part.argmax;
  double max = std::max(into.max, part.max);
  rescale(into, max);
  rescale(part, max);
  into.sum += part.sum;
  into.sum_x += part.sum_x;
  into.sum_sq += part.sum_sq;
  into.total += part.total;
  into.target += part.target;
  into.max = std::isnan(into.sum) ? into.sum : max;
}

namespace {

// -- work items ------------------------------------------------------------------------------------------------------
int64_t blocks_of(const Logits& in) { return (in.cols + kBlock - 1) / kBlock; }

// A thread that gets less than this many logits costs more to wake than it saves.
[[maybe_unused]] int worthwhile(const Logits& in, int threads) {
  constexpr int64_t kLogitsPerThread = 8192;
  int64_t most = in.rows * blocks_of(in);
  return int(std::clamp<int64_t>(in.rows * in.cols / kLogitsPerThread, 1, std::min<int64_t>(threads, most)));
}

}  // namespace

void check_storage(const char* name, Storage storage) {
  require(storage == Storage::f32 || storage == Storage::bf16, name,
          " dtype code must be 0 (float32) or 1 (bfloat16), got ", int(storage));
}

void forward(const Logits& in, State* state, int threads) {
  if (!check(in, state, threads)) return;
  const Isa& isa = align::isa();
  const int64_t blocks = blocks_of(in), items = in.rows * blocks;
  auto part = [&](int64_t row, int64_t block) {
    return isa.forward(in, row, block * kBlock, std::min(in.cols, (block + 1) * kBlock));
  };
  if (in.rows >= 4 * threads || blocks == 1) {
#pragma omp parallel for num_threads(worthwhile(in, threads)) schedule(static)
    for (int64_t row = 0; row < in.rows; row++) {
      FlushDenormals guard;
      for (int64_t block = 0; block < blocks; block++) merge(state[row], part(row, block));
    }
    return;
  }
  std::vector<State> parts(static_cast<size_t>(items));  // few long rows: the same sums, merged in the same order
#pragma omp parallel for num_threads(worthwhile(in, threads)) schedule(static)
  for (int64_t item = 0; item < items; item++) {
    FlushDenormals guard;
    parts[item] = part(item / blocks, item % blocks);
  }
  FlushDenormals guard;
  for (int64_t item = 0; item < items; item++) merge(state[item / blocks], parts[item]);
}

void exponentials(const Logits& in, State* state, const Exponentials& to, int threads) {
  if (!check(in, state, to, threads)) return;
  const Isa& isa = align::isa();
  const int64_t blocks = blocks_of(in);
#pragma omp parallel for num_threads(worthwhile(in, threads)) schedule(static)
  for (int64_t row = 0; row < in.rows; row++) {
    FlushDenormals guard;
    auto end = [&](int64_t block) { return std::min(in.cols, (block + 1) * kBlock); };
    float peak = -std::numeric_limits<float>::infinity(), &reference = to.reference[row];
    for (int64_t block = 0; block < blocks; block++)
      peak = std::max(peak, isa.peak(in, row, block * kBlock, end(block)));
    if (!(peak <= reference + kHeadroom)) reference = peak;
    for (int64_t block = 0; block < blocks; block++)
      merge(state[row], isa.exponentials(in, to, row, block * kBlock, end(block)));
  }
}

void backward(const Logits& in, const Gradient& grad, int threads) {
  if (!check_tile(in, grad, threads)) return;
  const Isa& isa = align::isa();
  const int64_t blocks = blocks_of(in), items = in.rows * blocks;
#pragma omp parallel for num_threads(worthwhile(in, threads)) schedule(static)
  for (int64_t item = 0; item < items; item++) {
    FlushDenormals guard;
    const int64_t begin = item % blocks * kBlock;
    isa.backward(in, grad, item / blocks, begin, std::min(in.cols, begin + kBlock));
  }
}

const Isa& isa() { return *chosen().load(); }

const Isa* const* available_isas() { return isas().data(); }

void set_isa(const char* name) { chosen().store(named("isa", available_isas(), name)); }

}  // namespace align
