// 6 x 16 floats are 12 of the 16 registers, 2 hold a row of B, one an element of A.
#include <immintrin.h>
#include <string.h>

#include "gemm_panels.h"

namespace align {
namespace {

constexpr int64_t W = 8, kTile = 6, kTileWide = 16;

typedef uint16_t Bf16;

float widen(float x) { return x; }
float widen(Bf16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}
__m256 load(const float* p) { return _mm256_loadu_ps(p); }
__m256 load(const Bf16* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}

void transpose(__m256 (&x)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    x[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

template <int64_t kSize, class T>
void copy(float* out, const T* in) {
  for (int64_t i = 0; i < kSize; i++) out[i] = widen(in[i]);
}

// `count` <= kSize vectors of `depth` elements, one every `across` and an element every `along`, as [depth][kSize] with
// zeros for what is missing. Writes up to 2 numbers more.
template <int64_t kSize, class T>
void pack(float* out, const T* in, int64_t across, int64_t along, int64_t count, int64_t depth) {
  int64_t k = 0;
  if (count == kSize && along == 1) {
    for (; k + 2 * W <= depth; k += 2 * W)
      for (int64_t part = 0; part < kSize; part += W)
        for (int64_t half = k; half < k + 2 * W; half += W) {  // a line of memory is read once
          __m256 x[8];
          for (int64_t i = 0; i < W; i++) x[i] = load(in + least(part + i, kSize - 1) * across + half);
          transpose(x);  // six are stored as eight: the next ones, or the next panel, overwrite two
          for (int64_t i = 0; i < W; i++) _mm256_storeu_ps(out + (half + i) * kSize + part, x[i]);
        }
  } else if (count == kSize && across == 1) {
    for (; k < depth; k++) copy<kSize>(out + k * kSize, in + k * along);
  }
  for (; k < depth; k++)
    for (int64_t i = 0; i < kSize; i++) out[k * kSize + i] = i < count ? widen(in[i * across + k * along]) : 0.0f;
}

// Panels of A [m][depth], one below the other.
template <class T>
void panels_a(float* out, const Matrix& a, int64_t m, int64_t depth) {
  const T* data = static_cast<const T*>(a.data);
  for (int64_t i = 0; i < m; i += kTile)
    pack<kTile>(out + i * depth, data + i * a.row, a.row, a.col, least(kTile, m - i), depth);
}

// Panels of B [depth][n], side by side.
template <class T>
void panels_b(float* out, const Matrix& b, int64_t n, int64_t depth) {
  const T* data = static_cast<const T*>(b.data);
  constexpr int64_t kPanels = 4, kAhead = 8;  // rows of several panels at once: fewer pages in turn
  int64_t j = 0;
  if (b.col == 1)
    for (; j + kPanels * kTileWide <= n; j += kPanels * kTileWide)
      for (int64_t k = 0; k < depth; k++) {
        const T* row = data + k * b.row + j;
        for (int64_t g = 0; g < kPanels * kTileWide; g += kTileWide) {
          _mm_prefetch(reinterpret_cast<const char*>(row + kAhead * b.row + g), _MM_HINT_T0);
          copy<kTileWide>(out + (j + g) * depth + k * kTileWide, row + g);
        }
      }
  for (; j < n; j += kTileWide)
    pack<kTileWide>(out + j * depth, data + j * b.col, b.col, b.row, least(kTileWide, n - j), depth);
}

// c [6, 16] (+)= a [depth][6] b [depth][16]
inline __attribute__((always_inline)) void tile(const float* a, const float* b, int64_t depth, float* c,
                                                int64_t stride, bool add) {
  __m256 left[kTile], right[kTile];
#pragma GCC unroll 6
  for (int i = 0; i < kTile; i++) {
    left[i] = right[i] = _mm256_setzero_ps();
    _mm_prefetch(reinterpret_cast<const char*>(c + i * stride), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(c + i * stride + W), _MM_HINT_T0);
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; k++, a += kTile, b += kTileWide) {
    __m256 b0 = _mm256_load_ps(b), b1 = _mm256_load_ps(b + W);
#pragma GCC unroll 6
    for (int i = 0; i < kTile; i++) {
      __m256 x = _mm256_broadcast_ss(a + i);
      left[i] = _mm256_fmadd_ps(x, b0, left[i]);
      right[i] = _mm256_fmadd_ps(x, b1, right[i]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTile; i++) {
    float* row = c + i * stride;
    if (add) {
      left[i] = _mm256_add_ps(left[i], _mm256_loadu_ps(row));
      right[i] = _mm256_add_ps(right[i], _mm256_loadu_ps(row + W));
    }
    _mm256_storeu_ps(row, left[i]);
    _mm256_storeu_ps(row + W, right[i]);
  }
}

struct Avx2 {
  using Packed = float;
  static constexpr int64_t kTile = align::kTile, kTileWide = align::kTileWide, kPanels = 16;
  static constexpr int64_t kWide = 64 * kTileWide, kDepth = 384;
  static int64_t slots(int64_t depth) { return depth; }

  static void pack_a(float* out, const Matrix& a, int64_t m, int64_t depth) {
    a.storage == Storage::f32 ? panels_a<float>(out, a, m, depth) : panels_a<Bf16>(out, a, m, depth);
  }
  static void pack_b(float* out, const Matrix& b, int64_t n, int64_t depth) {
    b.storage == Storage::f32 ? panels_b<float>(out, b, n, depth) : panels_b<Bf16>(out, b, n, depth);
  }
  void operator()(const float* a, const float* b, int64_t depth, float* c, int64_t stride, bool add) const {
    tile(a, b, depth, c, stride, add);
  }
};

}  // namespace

const Gemm avx2_gemm = {"avx2", kTile, kTileWide, Panels<Avx2>::packed, Panels<Avx2>::product};

}  // namespace align
