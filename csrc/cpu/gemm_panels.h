// Packed panels and a tile of C in registers (Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", 2008). A panel of B, depth x kWide, stays in the third-level cache, one of A, kTall x depth, in the
// second.
#pragma once
#include <stdint.h>
#include <string.h>
#include <xmmintrin.h>

#include "gemm.h"

namespace align {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t up(int64_t a, int64_t step) { return (a + step - 1) / step * step; }

// What of B is packed next, fetched some lines at a time while tiles are made: few rows of A would wait for it.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const Matrix& b, int64_t depth, int64_t n) {
    const bool by_columns = b.row == 1;
    at_ = static_cast<const char*>(b.data);
    stride_ = (by_columns ? b.col : b.row) * size_of(b.storage);
    lines_ = up((by_columns ? depth : n) * size_of(b.storage), kLine) / int64_t(kLine);
    left_ = (by_columns ? n : depth) * lines_;
  }
  int64_t left() const { return left_; }
  void fetch(int64_t lines) {
    for (; lines > 0 && left_ > 0; lines--, left_--) {
      _mm_prefetch(at_ + line_ * int64_t(kLine), _MM_HINT_T1);
      if (++line_ == lines_) line_ = 0, at_ += stride_;
    }
  }

 private:
  const char* at_ = nullptr;
  int64_t stride_ = 0, lines_ = 0, left_ = 0, line_ = 0;
};

// A way to multiply, `Tile`:
//   kTile, kTileWide: its tile of C; kPanels: tiles of a panel of A; kWide: columns of one of B; kDepth: of both
//   Packed: a packed number, or several; slots(depth): of them that a line of such a depth takes
//   pack_a(out, a, m, depth), pack_b(out, b, n, depth): lines [m] and [n] as panels of kTile and kTileWide of them
//   tile(a, b, depth, c, stride, add): a whole tile of C
//   Tile(), ~Tile(): around a product, on its thread
template <class Tile>
struct Panels {
  using Packed = typename Tile::Packed;
  static constexpr int64_t kTall = Tile::kPanels * Tile::kTile;

  static size_t packed_b(int64_t n) {
    return size_t(Tile::slots(Tile::kDepth) * least(up(n, Tile::kTileWide), Tile::kWide)) * sizeof(Packed);
  }
  // one line more: a panel may be written a little beyond its end
  static size_t packed(int64_t n) {
    return packed_b(n) + size_t(Tile::slots(Tile::kDepth) * kTall) * sizeof(Packed) + kLine;
  }

  static void product(const Product& p, void* memory) {
    Packed* const b = static_cast<Packed*>(memory);
    Packed* const a = reinterpret_cast<Packed*>(static_cast<char*>(memory) + packed_b(p.n));
    Tile tile;
    for (int64_t j0 = 0; j0 < p.n; j0 += Tile::kWide) {
      const int64_t n = least(Tile::kWide, p.n - j0);
      for (int64_t k0 = 0; k0 < p.k; k0 += Tile::kDepth) {
        const int64_t depth = least(Tile::kDepth, p.k - k0), slots = Tile::slots(depth);
        const bool add = p.add || k0 > 0;
        Tile::pack_b(b, from(p.b, k0, j0), n, depth);
        Ahead ahead = next(p, k0 + Tile::kDepth, j0);
        const int64_t tiles = up(p.m, Tile::kTile) / Tile::kTile * (up(n, Tile::kTileWide) / Tile::kTileWide);
        const int64_t lines = ahead.left() / tiles + 1;
        for (int64_t i0 = 0; i0 < p.m; i0 += kTall) {
          const int64_t m = least(kTall, p.m - i0);
          Tile::pack_a(a, from(p.a, i0, k0), m, depth);
          for (int64_t j = 0; j < n; j += Tile::kTileWide)
            for (int64_t i = 0; i < m; i += Tile::kTile) {
              ahead.fetch(lines);
              float* c = p.c + (i0 + i) * p.stride + j0 + j;
              const Packed *left = a + i * slots, *right = b + j * slots;
              if (m - i >= Tile::kTile && n - j >= Tile::kTileWide)
                tile(left, right, slots, c, p.stride, add);
              else
                at_the_edge(tile, left, right, slots, c, p.stride, add, least(Tile::kTile, m - i),
                            least(Tile::kTileWide, n - j));
            }
        }
      }
    }
  }

 private:
  // What is packed after the panel of B that ends at k0 of the columns j0.
  static Ahead next(const Product& p, int64_t k0, int64_t j0) {
    if (k0 >= p.k) k0 = 0, j0 += Tile::kWide;
    if (j0 >= p.n) return Ahead();
    return Ahead(from(p.b, k0, j0), least(Tile::kDepth, p.k - k0), least(Tile::kWide, p.n - j0));
  }

  // What is there is added by the tile, as elsewhere: a sum does not depend on how many rows and columns there are.
  static void at_the_edge(const Tile& tile, const Packed* a, const Packed* b, int64_t slots, float* c, int64_t stride,
                          bool add, int64_t m, int64_t n) {
    alignas(kLine) float whole[Tile::kTile * Tile::kTileWide] = {};
    const size_t width = size_t(n) * sizeof *c;
    for (int64_t i = 0; add && i < m; i++) memcpy(whole + i * Tile::kTileWide, c + i * stride, width);
    tile(a, b, slots, whole, Tile::kTileWide, add);
    for (int64_t i = 0; i < m; i++) memcpy(c + i * stride, whole + i * Tile::kTileWide, width);
  }
};

}  // namespace
}  // namespace align
