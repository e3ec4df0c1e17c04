// Checks and threads of lists.h: the kernels behind it trust what they get.
#include "lists.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "../require.h"
#include "denormals.h"
#include "tile.h"

namespace align {
namespace {

// -- checks ----------------------------------------------------------------------------------------------------------
// Whether there is anything to do. That columns ascend is trusted.
bool check(const Lists& lists, const float* values, int64_t columns, int threads) {
  require(threads >= 1, "threads must be >= 1, got ", threads);
  require(columns >= 0 && columns <= INT32_MAX, "columns must be >= 0 and fit in 32 bits, got ", columns);
  if (lists.rows == 0) return false;
  check_pointer("begins", lists.begins, 8);
  check_pointer("ends", lists.ends, 8);
  check_pointer("columns", lists.columns, 4);
  check_pointer("values", values, 4);
  for (int64_t t = 0; t < lists.rows; t++) {
    const int64_t begin = lists.begins[t], end = lists.ends[t];
    require(begin >= 0 && begin <= end, "entries of row ", t, " must not end before they begin, got ", begin, " .. ", end);
    if (begin < end)
      require(lists.columns[begin] >= 0 && lists.columns[end - 1] < columns, "columns of row ", t, " must lie in [0, ",
              columns, "), got ", lists.columns[begin], " .. ", lists.columns[end - 1]);
  }
  return true;
}

bool check(const Logits& in, const Some& some, int threads) {
  if (some.count == 0 || !check(in, some.state, threads)) return false;
  require(some.first >= 0 && some.first + in.cols <= INT32_MAX, "columns must fit in 32 bits, got ", some.first);
  check_pointer("rows", some.rows, 8);
  for (int64_t i = 0; i < some.count; i++)
    require(some.rows[i] >= 0 && some.rows[i] < in.rows, "rows must lie in [0, ", in.rows, "), got ", some.rows[i]);
  return true;
}

void check(const char* name, const Vectors& x) {
  check_storage(name, x.storage);
  check_pointer(name, x.data, size_of(x.storage));
  require(x.width >= 1 && x.stride >= x.width, name, " must have a row stride >= its ", x.width, " columns, got ",
          x.stride);
}

// -- packed strips ---------------------------------------------------------------------------------------------------
struct Free {
  void operator()(float* p) const { std::free(p); }
};

std::unique_ptr<float, Free> floats(int64_t count) {
  std::unique_ptr<float, Free> memory(static_cast<float*>(std::aligned_alloc(64, size_t(count) * sizeof(float))));
  if (!memory) throw std::bad_alloc();
  return memory;
}

int64_t pitch_of(int64_t width) { return (std::min(width, kStrip) + kLanes - 1) / kLanes * kLanes; }

// Strips of rows lie too far apart for the processor to see them coming: so many rows ahead.
constexpr int64_t kAhead = 4;

void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

// Columns `column` .. `column` + width of a row of x, with zeros behind them.
void pack(float* to, const Vectors& x, int64_t row, int64_t column, int64_t width, int64_t pitch) {
  const int64_t at = row * x.stride + column;
  prefetch(static_cast<const char*>(x.data) + (at + kAhead * x.stride) * size_of(x.storage), width * size_of(x.storage));
  if (x.storage == Storage::f32) {
    std::memcpy(to, static_cast<const float*>(x.data) + at, size_t(width) * sizeof(float));
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + at;
    for (int64_t i = 0; i < width; i++) {
      const uint32_t bits = uint32_t(from[i]) << 16;
      std::memcpy(to + i, &bits, sizeof bits);
    }
  }
  std::fill(to + width, to + pitch, 0.0f);
}

// -- tiles of lists --------------------------------------------------------------------------------------------------
// Where each row's entries in a tile of columns lie.
struct Span {
  int64_t begin, end;
};

// The place of the first column that is not below `column`.
int64_t place(const Lists& lists, int64_t t, int64_t column) {
  const int32_t* all = lists.columns;
  return std::lower_bound(all + lists.begins[t], all + lists.ends[t], column) - all;
}

// A thread that gets fewer products than this costs more to wake than it saves.
[[maybe_unused]] int worthwhile(const Lists& lists, int64_t width, int threads) {
  constexpr int64_t kLeast = 1 << 18;
  int64_t entries = 0;
  for (int64_t t = 0; t < lists.rows; t++) entries += lists.ends[t] - lists.begins[t];
  return int(std::clamp<int64_t>(entries * width / kLeast, 1, threads));
}

// A row of lists as a row of logits: what the primitives on tiles take of its entries begin .. end. All of it lies on a
// thread's stack: memory that runs out would throw, and no exception may leave the threads.
struct RowOfLists {
  Logits in;
  int64_t* targets;  // [rows], their places among the rows' entries
  float bias[kBlock];

  RowOfLists(const Logits& whole, int64_t* places) : in(whole), targets(places) { in.stride = 0, in.targets = places; }

  int64_t take(const Logits& whole, const Lists& lists, int64_t t, int64_t begin, int64_t end) {
    const int64_t column = whole.targets[t] - whole.offset, at = place(lists, t, column);
    const bool kept = at < lists.ends[t] && lists.columns[at] == column;
    targets[t] = kept ? at - begin : -1, in.offset = 0;
    in.z = static_cast<const char*>(whole.z) + begin * size_of(whole.storage);
    if (whole.bias) {
      for (int64_t i = begin; i < end; i++) bias[i - begin] = whole.bias[lists.columns[i]];
      in.bias = bias;
    }
    return end - begin;
  }
};

}  // namespace

// -- the choice ------------------------------------------------------------------------------------------------------
void survey(const Logits& in, const Survey& survey, int threads) {
  require(survey.every >= 1 && survey.steps >= 1 && survey.levels >= 1, "every, steps and levels must be >= 1");
  require(survey.levels <= kMostLevels, "levels must be <= ", kMostLevels, ", got ", survey.levels);
  require(survey.drop_mass > 0, "drop_mass must be > 0, got ", survey.drop_mass);
  if (!check(in, survey.some, threads)) return;
  check_pointer("sums", survey.sums, 8);
  const Isa& isa = align::isa();
  const double step = M_LN2 / double(survey.steps), log_mean = std::log(-std::expm1(-step) / step);
  double means[(kMostLevels + 2) * 3] = {1};  // where log p is spread evenly over a level
  for (int64_t level = 1; level <= survey.levels + 1; level++) {
    const double log_p = std::log(survey.drop_mass) - step * double(level - 1) + log_mean;
    const double p = level <= survey.levels ? std::exp(log_p) : 0.0;
    means[level * 3] = 1, means[level * 3 + 1] = p, means[level * 3 + 2] = -p * log_p;
  }
  Survey counted = survey;
  counted.means = means;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
  for (int64_t i = 0; i < survey.some.count; i++) isa.survey(in, counted, i);
}

void keep(const Logits& in, const Keep& keep, int threads) {
  require(in.storage == Storage::f32, "z must be float32");
  if (!check(in, keep.some, threads)) return;
  const Isa& isa = align::isa();
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
  for (int64_t i = 0; i < keep.some.count; i++)
    for (int64_t begin = 0; begin < in.cols; begin += kBlock)
      isa.keep(in, keep, i, begin, std::min(in.cols, begin + kBlock));
}

void forward(const Logits& in, const Lists& lists, State* state, int threads) {
  if (!check(in, state, threads) || !check(lists, static_cast<const float*>(in.z), in.cols, threads)) return;
  const Isa& isa = align::isa();
  std::vector<int64_t> targets(size_t(lists.rows));
#pragma omp parallel num_threads(threads)
  {
    FlushDenormals guard;
    RowOfLists row(in, targets.data());
#pragma omp for schedule(dynamic, 4)
    for (int64_t t = 0; t < lists.rows; t++)
      for (int64_t begin = lists.begins[t]; begin < lists.ends[t]; begin += kBlock) {
        const int64_t n = row.take(in, lists, t, begin, std::min(lists.ends[t], begin + kBlock));
        merge(state[t], isa.forward(row.in, t, 0, n));
      }
  }
}

void backward(const Logits& in, const Lists& lists, const Gradient& grad, int threads) {
  if (!check(in, grad, threads) || !check(lists, static_cast<const float*>(in.z), in.cols, threads)) return;
  check_pointer("out", grad.out, size_of(grad.storage));
  const Isa& isa = align::isa();
  std::vector<int64_t> targets(size_t(lists.rows));
#pragma omp parallel num_threads(threads)
  {
    FlushDenormals guard;
    RowOfLists row(in, targets.data());
    Gradient part = grad;
    part.stride = 0;
#pragma omp for schedule(dynamic, 4)
    for (int64_t t = 0; t < lists.rows; t++)
      for (int64_t begin = lists.begins[t]; begin < lists.ends[t]; begin += kBlock) {
        const int64_t n = row.take(in, lists, t, begin, std::min(lists.ends[t], begin + kBlock));
        part.out = static_cast<char*>(grad.out) + begin * size_of(grad.storage);
        isa.backward(row.in, part, t, 0, n);
      }
  }
}

// -- products --------------------------------------------------------------------------------------------------------
void pull(const Lists& lists, const float* values, const Vectors& w, int64_t first, int64_t count, float* out,
          int threads) {
  require(first >= 0 && count >= 0, "columns must be >= 0, got ", first, " and ", count, " from there");
  if (!check(lists, values, INT32_MAX, threads) || count == 0) return;
  check("w", w);
  check_pointer("out", out, sizeof *out);
  constexpr int64_t kColumns = 1024;  // a strip of so many stays in the second-level cache
  const Isa& isa = align::isa();
  const int64_t pitch = pitch_of(w.width), end = first + count;
  const auto packed = floats(kColumns * pitch);
  std::vector<Span> spans(size_t(lists.rows), Span{});
  std::vector<char> used(kColumns);
  for (int64_t t = 0; t < lists.rows; t++) spans[size_t(t)].end = place(lists, t, first);
#pragma omp parallel num_threads(worthwhile(lists, w.width, threads))
  for (int64_t v0 = first; v0 < end; v0 += kColumns) {
    const int64_t v1 = std::min(end, v0 + kColumns);
#pragma omp single
    {
      std::fill(used.begin(), used.end(), 0);
      for (int64_t t = 0; t < lists.rows; t++) {
        int64_t i = spans[size_t(t)].begin = spans[size_t(t)].end;
        for (; i < lists.ends[t] && lists.columns[i] < v1; i++) used[size_t(lists.columns[i] - v0)] = 1;
        spans[size_t(t)].end = i;
      }
    }
    for (int64_t d = 0; d < w.width; d += kStrip) {
      const int64_t width = std::min(kStrip, w.width - d);
#pragma omp for schedule(static)
      for (int64_t v = v0; v < v1; v++)
        if (used[size_t(v - v0)]) pack(packed.get() + (v - v0) * pitch, w, v - first, d, width, pitch);
#pragma omp for schedule(dynamic, 8)
      for (int64_t t = 0; t < lists.rows; t++) {
        const auto [begin, stop] = spans[size_t(t)];
        if (begin < stop)
          isa.combine({packed.get(), pitch, lists.columns + begin, int32_t(v0), values + begin, stop - begin,
                       out + t * w.width + d, width, true});
      }
    }
  }
}

void push(const Lists& lists, const float* values, const Vectors& x, int64_t columns, float* out, bool add,
          int threads) {
  if (!check(lists, values, columns, threads) || columns == 0) return;
  check("x", x);
  check_pointer("out", out, sizeof *out);
  constexpr int64_t kColumns = 4096;
  const Isa& isa = align::isa();
  const int64_t pitch = pitch_of(x.width), tiles = (columns + kColumns - 1) / kColumns;
  std::atomic<int64_t> next{0};
  std::exception_ptr failed;  // of memory: no exception may leave the threads
#pragma omp parallel num_threads(worthwhile(lists, x.width, threads))
  try {
    const auto packed = floats(lists.rows * pitch);
    std::vector<Span> spans(size_t(lists.rows), Span{});
    std::vector<int64_t> ends(kColumns + 1);  // of each column's entries
    std::vector<int32_t> rows;
    std::vector<float> factors;
    for (int64_t tile; (tile = next++) < tiles;) {
      const int64_t v0 = tile * kColumns, wide = std::min(columns - v0, kColumns);
      std::fill(ends.begin(), ends.end(), 0);
      for (int64_t t = 0; t < lists.rows; t++) {
        int64_t i = place(lists, t, v0);
        spans[size_t(t)].begin = i;
        for (; i < lists.ends[t] && lists.columns[i] < v0 + wide; i++) ends[size_t(lists.columns[i] - v0 + 1)]++;
        spans[size_t(t)].end = i;
      }
      for (int64_t v = 0; v < wide && !add; v++)
        if (!ends[size_t(v + 1)]) std::fill_n(out + (v0 + v) * x.width, x.width, 0.0f);
      for (int64_t v = 0; v < wide; v++) ends[size_t(v + 1)] += ends[size_t(v)];
      rows.resize(size_t(ends[size_t(wide)])), factors.resize(rows.size());
      for (int64_t t = 0; t < lists.rows; t++)  // rows ascend in a column; ends[v] moves from its begin to its end
        for (int64_t i = spans[size_t(t)].begin; i < spans[size_t(t)].end; i++) {
          const size_t at = size_t(ends[size_t(lists.columns[i] - v0)]++);
          rows[at] = int32_t(t), factors[at] = values[i];
        }
      for (int64_t d = 0; d < x.width; d += kStrip) {
        const int64_t width = std::min(kStrip, x.width - d);
        for (int64_t t = 0; t < lists.rows; t++)
          if (spans[size_t(t)].begin < spans[size_t(t)].end) pack(packed.get() + t * pitch, x, t, d, width, pitch);
        for (int64_t v = 0, begin = 0; v < wide; begin = ends[size_t(v++)]) {
          const int64_t count = ends[size_t(v)] - begin;
          float* to = out + (v0 + v) * x.width + d;
          if (count) {
            prefetch(to + kAhead * x.width, width * int64_t(sizeof *to));
            isa.combine({packed.get(), pitch, rows.data() + begin, 0, factors.data() + begin, count, to, width, add});
          }
        }
      }
    }
  } catch (...) {
#pragma omp critical
    failed = std::current_exception();
  }
  if (failed) std::rethrow_exception(failed);
}

}  // namespace align
