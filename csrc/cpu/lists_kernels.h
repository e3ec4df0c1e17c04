// Choice of columns and sums over them, for the instruction set that the including file is compiled for.
#pragma once
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "lists.h"
#include "tile_kernels.h"

namespace align {
namespace {

INLINE float log_sum_of(const State& state) { return float(state.max + log(state.sum)); }

// Whether every lane holds -1, or none.
INLINE bool all_lanes(I mask, bool set) {
  uint64_t words[kVectorBytes / 8], differ = 0, wanted = set ? ~uint64_t(0) : 0;
  memcpy(words, &mask, sizeof mask);
  for (uint64_t word : words) differ |= word ^ wanted;
  return !differ;
}

// -- a sample --------------------------------------------------------------------------------------------------------
void survey_row(const Logits& in, const Survey& survey, int64_t i) {
  constexpr int64_t kAhead = 6;  // runs lie too far apart for the processor to see them coming
  const int64_t row = survey.some.rows[i], last = survey.levels + 1, apart = survey.every * kRun;
  const float lse = log_sum_of(survey.some.state[row]);
  const float slope = float(-survey.steps / M_LN2), top = float(survey.steps * log2(survey.drop_mass));
  double* sums = survey.sums + i * (survey.levels + 2) * 3;
  int32_t counts[kMostLevels + 2];
  for (int64_t level = 0; level <= last; level++) counts[level] = 0;
  F mass{}, minus{};  // of the last level, which has no lower edge
  Scratch scratch;
  const int64_t size = in.storage == Storage::f32 ? 4 : 2, lead = survey.every / 2 * kRun - survey.some.first % apart;
  for (int64_t begin = lead < 0 ? lead + apart : lead; begin < in.cols; begin += apart) {
    __builtin_prefetch(static_cast<const char*>(in.z) + (row * in.stride + begin + kAhead * apart) * size);
    const int64_t n = in.cols - begin < kRun ? in.cols - begin : kRun;
    Block block = prepare(in, row, begin, n, scratch);
    sweep(n, [&](int64_t at, int64_t count) {
      F log_p = max(all(kLowest), load(block.x + at, count) * block.k - lse);
      for (int64_t lane = count; lane < W; lane++) log_p[lane] = kLowest;  // of no column: its exponential is 0
      F level = min(all(float(last)), max(F{}, log_p * slope + top));
      I place = __builtin_convertvector(level, I);
      place -= __builtin_convertvector(place, F) < level;  // rounded up: a comparison that holds is -1
      const I low = place == int32_t(last);
      F p = exp_in_range(low ? log_p : all(kLowest));
      mass += p;
      minus -= p * log_p;
      if (all_lanes(low, true))
        counts[last] += int32_t(count);
      else
        for (int64_t lane = 0; lane < count; lane++) counts[place[lane]]++;
    });
  }
  for (int64_t level = 0; level <= last; level++)
    for (int64_t j = 0; j < 3; j++) sums[level * 3 + j] += counts[level] * survey.means[level * 3 + j];
  for (int64_t lane = 0; lane < W; lane++) sums[last * 3 + 1] += mass[lane], sums[last * 3 + 2] += minus[lane];
}

// -- lists -----------------------------------------------------------------------------------------------------------
// A row's entries in the making.
struct Entries {
  int32_t* columns;
  float* z;
  int64_t found, room;

  INLINE void add(int32_t column, float value) {
    if (found < room) columns[found] = column, z[found] = value;
    found++;
  }
};

// Those of n columns from `column` on whose x reaches `least`.
INLINE void add_range(Entries& to, const float* x, const float* z, int64_t n, float least, int32_t column) {
  int64_t i = 0;
  for (; i + W <= n && to.found + W <= to.room; i += W) {  // whole vectors are written
    F v = load(x + i, W);
#if defined(__AVX512F__)
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __mmask16 hit = _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(least), _CMP_GE_OQ);
    if (!hit) continue;
    const __m512i columns = _mm512_add_epi32(lanes, _mm512_set1_epi32(column + int32_t(i)));
    _mm512_storeu_si512(to.columns + to.found, _mm512_maskz_compress_epi32(hit, columns));
    _mm512_storeu_ps(to.z + to.found, _mm512_maskz_compress_ps(hit, _mm512_loadu_ps(z + i)));
    to.found += __builtin_popcount(hit);
#else
    if (all_lanes(v >= least, false)) continue;
    for (int64_t lane = i; lane < i + W; lane++) {  // without a branch
      to.columns[to.found] = column + int32_t(lane), to.z[to.found] = z[lane];
      to.found += x[lane] >= least;
    }
#endif
  }
  for (; i < n; i++)
    if (x[i] >= least) to.add(column + int32_t(i), z[i]);
}

void keep_block(const Logits& in, const Keep& keep, int64_t i, int64_t begin, int64_t end) {
  const int64_t row = keep.some.rows[i], n = end - begin, target = in.targets[row] - in.offset - begin;
  Scratch scratch;
  Block block = prepare(in, row, begin, n, scratch);
  const float least = (log_sum_of(keep.some.state[row]) + keep.floors[i]) / block.k;
  const float *x = block.x, *z = static_cast<const float*>(in.z) + row * in.stride + begin;
  const int32_t column = int32_t(keep.some.first + begin);
  Entries to{keep.columns + keep.begins[i], keep.z + keep.begins[i], keep.found[i], keep.rooms[i]};
  int64_t rest = 0;
  if (target >= 0 && target < n) {
    add_range(to, x, z, target, least, column);
    to.add(column + int32_t(target), z[target]);
    rest = target + 1;
  }
  add_range(to, x + rest, z + rest, n - rest, least, column + int32_t(rest));
  keep.found[i] = to.found;
}

// -- sums ------------------------------------------------------------------------------------------------------------
// As many strips of kVectors vectors as lie between `at` and the pitch; returns where they end.
template <int kVectors>
INLINE int64_t combine_strips(const Combination& c, int64_t at) {
  for (; at + kVectors * W <= c.pitch; at += kVectors * W) {
    F sum[kVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; j++) sum[j] = F{};
    for (int64_t i = 0; i < c.count; i++) {
      const float* row = c.packed + (c.index[i] - c.base) * c.pitch + at;
      const float factor = c.factors[i];
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; j++) sum[j] += factor * load(row + j * W, W);
    }
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; j++) {
      float* out = c.out + at + j * W;
      const int64_t left = c.width - at - j * W, count = left < W ? left : W;
      if (count > 0) store(out, c.add ? load(out, count) + sum[j] : sum[j], count);
    }
  }
  return at;
}

void combine(const Combination& c) { combine_strips<1>(c, combine_strips<4>(c, combine_strips<14>(c, 0))); }

}  // namespace
}  // namespace align
