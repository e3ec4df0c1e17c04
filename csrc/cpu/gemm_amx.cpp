// Tiles of 16 rows of 64 bytes: four hold 32 x 32 floats of C, two a column of blocks of A, two a row of blocks of B.
#include "gemm_pairs.h"

#if __has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>)  // GCC's, Clang's
#define AMX __attribute__((target("amx-tile,amx-bf16")))

namespace align {
namespace {

// What _tile_loadconfig reads.
struct alignas(kLine) Config {
  uint8_t palette, start, none[14];
  uint16_t bytes[16];  // of a row of each tile
  uint8_t rows[16];
};
constexpr Config kConfig = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

class Amx {
 public:
  using Packed = Pair;
  static constexpr int64_t kTile = 2 * kBlock, kTileWide = 2 * kBlock, kPanels = 4;
  static constexpr int64_t kWide = 16 * kTileWide, kDepth = 1024;
  static int64_t slots(int64_t depth) { return up((depth + 1) / 2, kBlock); }

  static void pack_a(Pair* out, const Matrix& a, int64_t m, int64_t depth) {
    pack<kTile, false>(out, a.data, a.row, a.col, m, depth, slots(depth));
  }
  static void pack_b(Pair* out, const Matrix& b, int64_t n, int64_t depth) {
    pack<kTileWide, true>(out, b.data, b.col, b.row, n, depth, slots(depth));
  }

  // Others on this thread may count on what they have set: it is put back.
  AMX Amx() {
    _tile_storeconfig(&before_);
    _tile_loadconfig(&kConfig);
  }
  AMX ~Amx() { _tile_loadconfig(&before_); }
  Amx(const Amx&) = delete;
  void operator=(const Amx&) = delete;

  // c [32, 32] (+)= a [pairs / 16][32][16] b [pairs][32]
  AMX void operator()(const Pair* a, const Pair* b, int64_t pairs, float* c, int64_t stride, bool add) const {
    const int64_t row = stride * int64_t(sizeof *c);
    constexpr int64_t line = kBlock * int64_t(sizeof *a), wide = kTileWide * int64_t(sizeof *b);
    float* const below = c + kBlock * stride;
    __asm__ volatile("" ::: "memory");  // GCC does not know that a tile's load reads memory
    if (add) {
      _tile_loadd(0, c, row);
      _tile_loadd(1, c + kBlock, row);
      _tile_loadd(2, below, row);
      _tile_loadd(3, below + kBlock, row);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t p = 0; p < pairs; p += kBlock, a += kBlock * kTile, b += kBlock * kTileWide) {
      _tile_loadd(4, a, line);
      _tile_loadd(5, a + kBlock * kBlock, line);
      _tile_loadd(6, b, wide);
      _tile_loadd(7, b + kBlock, wide);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, row);
    _tile_stored(1, c + kBlock, row);
    _tile_stored(2, below, row);
    _tile_stored(3, below + kBlock, row);
  }

 private:
  Config before_;
};

constexpr Gemm gemm = {"amx_bf16", Amx::kTile, Amx::kTileWide, Panels<Amx>::packed, Panels<Amx>::product};

}  // namespace

const Gemm* const amx_gemm = &gemm;

}  // namespace align
#else  // a compiler that does not know them
namespace align {
const Gemm* const amx_gemm = nullptr;
}
#endif
