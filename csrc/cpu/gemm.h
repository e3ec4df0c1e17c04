// C (+)= A B in float32, for machines whose torch.mm is slow. No torch header, as in tile.h.
#pragma once
#include <cstddef>
#include <cstdint>

#include "storage.h"

namespace align {

// C [m, n] with rows `stride` apart; A [m, k] and B [k, n] with an element every `row` and `col` numbers. bfloat16 is
// widened where it is packed: no copy is made first.
struct Matrix {
  const void* data;
  Storage storage;
  int64_t row, col;

  Matrix from(int64_t i, int64_t j) const {
    return {static_cast<const char*>(data) + (i * row + j * col) * size_of(storage), storage, row, col};
  }
};
struct Product {
  Matrix a, b;
  float* c;
  int64_t stride, m, n, k;
  bool add;
};

// A panel of B, kDepth x kWide, stays in the third-level cache, a panel of A, kTall x kDepth, in the second.
constexpr int64_t kTile = 6, kTileWide = 16;
constexpr int64_t kDepth = 384, kTall = 16 * kTile, kWide = 64 * kTileWide;
constexpr size_t kLine = 64;  // bytes

// Floats that a product of n columns packs into, a multiple of a line.
static inline int64_t packed_size(int64_t n) {
  const int64_t wide = n < kWide ? (n + kTileWide - 1) / kTileWide * kTileWide : kWide;
  return kDepth * (wide + kTall) + int64_t(kLine / sizeof(float));
}

// The whole product on one thread; packed [packed_size(n)] is aligned to a line.
void product_avx2(const Product&, float* packed);

// Raises std::invalid_argument. No sum depends on the number of threads.
void product(const Product&, int threads);

// Whether the machine is one on which `product` was measured faster than torch.mm.
bool product_advised();

}  // namespace align
