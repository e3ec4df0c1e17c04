// AMX's tiles in C++, after Intel's manual, volume 2. Whatever a processor raises an exception for is left undone, and
// the first such fault is kept.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <atomic>

namespace amx {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;  // of palette 1

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "what LDTILECFG reads");

struct Tiles {
  Config config;
  uint8_t data[kTiles][kRows][kRowBytes];
};
inline thread_local Tiles tiles;  // zero: not configured
inline std::atomic<const char*> fault;

inline bool wrong(bool so, const char* what) {
  const char* none = nullptr;
  if (so) fault.compare_exchange_strong(none, what);
  return so;
}

inline void load_config(const void* from) {
  Config next;
  memcpy(&next, from, sizeof next);
  if (wrong(next.palette > 1, "no such palette")) return;
  if (next.palette == 0) next = {};
  bool reserved = false, sizes = false;
  for (uint8_t byte : next.reserved) reserved |= byte != 0;
  for (int t = 0; t < 16; t++) {
    const int rows = next.rows[t], bytes = next.row_bytes[t];
    if (t < kTiles)
      sizes |= rows > kRows || bytes > kRowBytes || (rows == 0) != (bytes == 0);
    else
      reserved |= rows != 0 || bytes != 0;
  }
  if (wrong(reserved, "reserved bytes of a configuration") || wrong(sizes, "no such size of a tile")) return;
  tiles = {next, {}};
}
inline void store_config(void* to) { memcpy(to, &tiles.config, sizeof tiles.config); }

inline bool usable(int tile) {
  // a row to begin at is left by an interrupted instruction alone, which none is here
  return !wrong(tiles.config.palette == 0, "tiles are not configured") &&
         !wrong(tile >= kTiles || tiles.config.rows[tile] == 0, "a tile that is not configured") &&
         !wrong(tiles.config.start_row != 0, "a row to begin at");
}

inline void zero(int tile) {
  if (usable(tile)) memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}
inline void load(int tile, const void* from, int64_t stride) {
  if (!usable(tile)) return;
  memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
  for (int i = 0; i < tiles.config.rows[tile]; i++)
    memcpy(tiles.data[tile][i], static_cast<const char*>(from) + i * stride, tiles.config.row_bytes[tile]);
}
inline void store(int tile, void* to, int64_t stride) {
  if (!usable(tile)) return;
  for (int i = 0; i < tiles.config.rows[tile]; i++)
    memcpy(static_cast<char*>(to) + i * stride, tiles.data[tile][i], tiles.config.row_bytes[tile]);
}

inline float widen(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// A row of C, n numbers: even and odd products are summed apart, from zero, and what C holds is added last.
inline __attribute__((noinline)) void add_row(uint8_t* c, const uint8_t* a, const uint8_t (*b)[kRowBytes], int pairs,
                                              int n) {
  float sums[kRowBytes / 2] = {}, row[kRowBytes / 4];
  uint16_t left[kRowBytes / 2], right[kRowBytes / 2];
  memcpy(left, a, sizeof left);
  memcpy(row, c, sizeof row);
  for (int k = 0; k < pairs; k++) {
    memcpy(right, b[k], sizeof right);
    for (int j = 0; j < 2 * n; j++) sums[j] = fmaf(widen(left[2 * k + j % 2]), widen(right[j]), sums[j]);
  }
  for (int j = 0; j < n; j++) row[j] += sums[2 * j] + sums[2 * j + 1];
  memcpy(c, row, size_t(n) * sizeof *row);
}

// TDPBF16PS: c += a b
inline void multiply(int c, int a, int b) {
  if (!usable(c) || !usable(a) || !usable(b)) return;
  const Config& of = tiles.config;
  const bool fit = of.rows[c] == of.rows[a] && of.row_bytes[c] == of.row_bytes[b] &&
                   of.row_bytes[a] == 4 * of.rows[b] && of.row_bytes[c] % 4 == 0;
  if (wrong(c == a || c == b || a == b, "one tile twice") || wrong(!fit, "tiles that do not fit together")) return;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // to the nearest even, denormals as zero in and out, no exception
  for (int i = 0; i < of.rows[c]; i++)
    add_row(tiles.data[c][i], tiles.data[a][i], tiles.data[b], of.rows[b], of.row_bytes[c] / 4);
  _mm_setcsr(before);
}

}  // namespace amx
