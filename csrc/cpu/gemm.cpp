// Checks, threads and the machines that are served: the kernel behind it trusts what it gets.
#include "gemm.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "../require.h"
#include "processor.h"

namespace align {
namespace {

void check(const char* name, const Matrix& x, int64_t rows, int64_t cols) {
  check_storage(name, x.storage);
  check_pointer(name, x.data, size_of(x.storage));
  require(x.row >= 0 && x.col >= 0, name, " [", rows, ", ", cols, "] must have strides >= 0, got ", x.row, ", ", x.col);
}

#ifdef __x86_64__
int64_t slice(int64_t size, int64_t parts, int64_t step) { return ((size + parts - 1) / parts + step - 1) / step * step; }

struct Free {
  void operator()(float* p) const { std::free(p); }
};

// Memory of the calling thread for `count` floats, kept from call to call: fresh pages cost more than a small product.
// At most 1.7 MB for each thread that multiplies, which no workspace counts.
float* scratch(int64_t count) {
  static thread_local std::unique_ptr<float, Free> memory;
  static thread_local int64_t size = 0;
  if (count > size) {
    size = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(kLine, size_t(count) * sizeof(float))));
    if (!memory) throw std::bad_alloc();
    size = count;
  }
  return memory.get();
}
#endif

}  // namespace

bool product_advised() {
#ifdef __x86_64__
  return serves_avx2() && __builtin_cpu_is("amd") && !serves_avx512();
#else
  return false;
#endif
}

#ifdef __x86_64__
void product(const Product& p, int threads) {
  require(serves_avx2(), "product needs a processor with AVX2 and FMA");
  require(threads >= 1, "threads must be >= 1, got ", threads);
  require(p.m >= 0 && p.n >= 0 && p.k >= 1, "sizes must be >= 0, k >= 1, got ", p.m, ", ", p.n, ", ", p.k);
  if (p.m == 0 || p.n == 0) return;
  check("a", p.a, p.m, p.k);
  check("b", p.b, p.k, p.n);
  check_pointer("c", p.c, sizeof *p.c);
  require(p.m == 1 || p.stride >= p.n, "c must have a row stride >= its columns");

  // a slice of C for each thread: packing an element costs about as much as forty of its products
  constexpr int64_t kPacking = 40, kLeast = 1 << 20;
  const int64_t most = std::clamp<int64_t>(p.m * p.n * p.k / kLeast, 1, threads);
  int64_t height = p.m, width = p.n, best = 0;
  for (int64_t down = 1; down <= most; down++) {
    const int64_t h = slice(p.m, down, kTile), w = slice(p.n, most / down, kTileWide);
    const int64_t cost = h * w + kPacking * (h + w);
    if (best == 0 || cost < best) best = cost, height = h, width = w;
  }
  const int64_t across = (p.n + width - 1) / width, items = (p.m + height - 1) / height * across;
  const int64_t each = packed_size(width);
  float* packed = scratch(items * each);
#pragma omp parallel for num_threads(int(most)) schedule(static)
  for (int64_t item = 0; item < items; item++) {
    const int64_t i = item / across * height, j = item % across * width;
    Product part = p;
    part.a = p.a.from(i, 0), part.b = p.b.from(0, j), part.c += i * p.stride + j;
    part.m = std::min(height, p.m - i), part.n = std::min(width, p.n - j);
    product_avx2(part, packed + item * each);
  }
}
#else
void product(const Product&, int) { require(false, "product serves x86-64 alone"); }
#endif

}  // namespace align
