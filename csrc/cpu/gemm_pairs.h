// Lines of bfloat16 packed by pairs along the depth, as the units that multiply them take those. AVX-512.
#pragma once
#include <immintrin.h>
#include <string.h>

#include "gemm_panels.h"

namespace align {
namespace {

typedef uint16_t Bf16;
typedef uint32_t Pair;           // of numbers that follow each other along the depth
constexpr int64_t kBlock = 16;   // lines, and pairs, of a block that is transposed

// x[j] holds element j of each of x[0..15], and the other way round.
void transpose(__m512i (&x)[kBlock]) {
  __m512i t[kBlock], u[kBlock];
  for (int i = 0; i < kBlock; i += 2) {
    t[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < kBlock; i += 4)
    for (int j = 0; j < 2; j++) {
      u[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      u[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int j = 0; j < 4; j++) {
    const __m512i even = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88), odd = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88);
    const __m512i odd2 = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);
    x[j] = _mm512_shuffle_i32x4(even, even2, 0x88);
    x[4 + j] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    x[8 + j] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    x[12 + j] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
}

inline __mmask32 first(int64_t count) {
  return count >= 32 ? ~__mmask32(0) : count > 0 ? (__mmask32(1) << count) - 1 : 0;
}

// At most kBlock lines of a matrix [lines][2 kBlock], zero where it ends; `lines` below 1 are none. `by_pairs`: x[p] is
// pair p of each line, else x[l] is all of line l.
inline void load(__m512i (&x)[kBlock], const Bf16* in, int64_t across, int64_t along, int64_t lines, int64_t depth,
                 bool by_pairs) {
  const bool pairs = along != 1 && across == 1;
  if (pairs) {
    const __mmask16 some = __mmask16(first(lines));
    for (int64_t p = 0; p < kBlock; p++) {
      const Bf16* at = in + 2 * p * along;
      const __m256i none = _mm256_setzero_si256();
      const __m256i even = 2 * p < depth ? _mm256_maskz_loadu_epi16(some, at) : none;
      const __m256i odd = 2 * p + 1 < depth ? _mm256_maskz_loadu_epi16(some, at + along) : none;
      x[p] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
    }
  } else if (along == 1) {
    const __mmask32 some = first(depth);
    for (int64_t l = 0; l < kBlock; l++)
      x[l] = l < lines ? _mm512_maskz_loadu_epi16(some, in + l * across) : _mm512_setzero_si512();
  } else {
    Bf16 lying[kBlock][2 * kBlock] = {};
    for (int64_t l = 0; l < lines; l++)
      for (int64_t k = 0; k < least(depth, 2 * kBlock); k++) lying[l][k] = in[l * across + k * along];
    memcpy(x, lying, sizeof x);
  }
  if (pairs != by_pairs) transpose(x);
}

// Panels of kLines lines, with zeros for what is missing: [pairs][kLines] by pairs, which writes up to 2 pairs more, else
// [pairs / kBlock][kLines][kBlock], pairs a multiple of kBlock.
template <int64_t kLines, bool kByPairs>
void pack(Pair* out, const void* data, int64_t across, int64_t along, int64_t lines, int64_t depth, int64_t pairs) {
  const Bf16* in = static_cast<const Bf16*>(data);
  for (int64_t i = 0; i < lines; i += kLines, out += kLines * pairs)
    for (int64_t p0 = 0; p0 < pairs; p0 += kBlock)
      for (int64_t l0 = 0; l0 < kLines; l0 += kBlock) {
        const Bf16* block = in + (i + l0) * across + 2 * p0 * along;
        __m512i x[kBlock];
        load(x, block, across, along, least(least(kLines, lines - i) - l0, kBlock), depth - 2 * p0, kByPairs);
        for (int64_t j = 0; j < (kByPairs ? least(kBlock, pairs - p0) : kBlock); j++)
          _mm512_storeu_si512(out + (kByPairs ? (p0 + j) * kLines + l0 : p0 * kLines + (l0 + j) * kBlock), x[j]);
      }
}

}  // namespace
}  // namespace align
