// 14 x 32 floats are 28 of the 32 registers, 2 hold a row of pairs of B, one a pair of A.
#include "gemm_pairs.h"

#if __has_include(<avx512bf16intrin.h>)
namespace align {
namespace {

struct Avx512Bf16 {
  using Packed = Pair;
  static constexpr int64_t kTile = 14, kTileWide = 2 * kBlock, kPanels = 8;
  static constexpr int64_t kWide = 16 * kTileWide, kDepth = 1024;
  static int64_t slots(int64_t depth) { return (depth + 1) / 2; }

  static void pack_a(Pair* out, const Matrix& a, int64_t m, int64_t depth) {
    pack<kTile, true>(out, a.data, a.row, a.col, m, depth, slots(depth));
  }
  static void pack_b(Pair* out, const Matrix& b, int64_t n, int64_t depth) {
    pack<kTileWide, true>(out, b.data, b.col, b.row, n, depth, slots(depth));
  }

  // c [14, 32] (+)= a [pairs][14] b [pairs][32]
  __attribute__((target("avx512bf16"))) void operator()(const Pair* a, const Pair* b, int64_t pairs, float* c,
                                                        int64_t stride, bool add) const {
    __m512 left[kTile], right[kTile];
#pragma GCC unroll 14
    for (int i = 0; i < kTile; i++) {
      left[i] = right[i] = _mm512_setzero_ps();
      _mm_prefetch(reinterpret_cast<const char*>(c + i * stride), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(c + i * stride + kBlock), _MM_HINT_T0);
    }
    for (int64_t p = 0; p < pairs; p++, a += kTile, b += kTileWide) {
      const __m512bh b0 = (__m512bh)_mm512_load_si512(b), b1 = (__m512bh)_mm512_load_si512(b + kBlock);
#pragma GCC unroll 14
      for (int i = 0; i < kTile; i++) {
        const __m512bh x = (__m512bh)_mm512_set1_epi32(int(a[i]));
        left[i] = _mm512_dpbf16_ps(left[i], x, b0);
        right[i] = _mm512_dpbf16_ps(right[i], x, b1);
      }
    }
#pragma GCC unroll 14
    for (int i = 0; i < kTile; i++) {
      float* row = c + i * stride;
      if (add) {
        left[i] = _mm512_add_ps(left[i], _mm512_loadu_ps(row));
        right[i] = _mm512_add_ps(right[i], _mm512_loadu_ps(row + kBlock));
      }
      _mm512_storeu_ps(row, left[i]);
      _mm512_storeu_ps(row + kBlock, right[i]);
    }
  }
};

constexpr Gemm gemm = {"avx512_bf16", Avx512Bf16::kTile, Avx512Bf16::kTileWide, Panels<Avx512Bf16>::packed,
                       Panels<Avx512Bf16>::product};

}  // namespace

const Gemm* const avx512_bf16_gemm = &gemm;

}  // namespace align
#else  // a compiler that does not know them
namespace align {
const Gemm* const avx512_bf16_gemm = nullptr;
}
#endif
