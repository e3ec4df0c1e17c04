// Checks, threads and the machines that are served: the kernel behind it trusts what it gets.
#include "gemm.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../require.h"
#include "named.h"
#include "processor.h"

namespace align {
namespace {

#ifdef __x86_64__
void check(const char* name, const Matrix& x, int64_t rows, int64_t cols) {
  check_storage(name, x.storage);
  check_pointer(name, x.data, size_of(x.storage));
  require(x.row >= 0 && x.col >= 0, name, " [", rows, ", ", cols, "] must have strides >= 0, got ", x.row, ", ", x.col);
}

int64_t slice(int64_t size, int64_t parts, int64_t step) { return ((size + parts - 1) / parts + step - 1) / step * step; }

struct Free {
  void operator()(char* p) const { std::free(p); }
};

// Memory of the calling thread, kept from call to call: fresh pages cost more than a small product. At most 1.7 MB for
// each thread that multiplies, which no workspace counts.
char* scratch(size_t bytes) {
  static thread_local std::unique_ptr<char, Free> memory;
  static thread_local size_t size = 0;
  if (bytes > size) {
    size = 0;
    memory.reset(static_cast<char*>(std::aligned_alloc(kLine, bytes)));
    if (!memory) throw std::bad_alloc();
    size = bytes;
  }
  return memory.get();
}

const std::vector<const Gemm*>& narrow_gemms() {
  static const std::vector<const Gemm*> all = [] {
    std::vector<const Gemm*> some;
    if (serves_avx2()) some.push_back(&avx2_gemm);
    if (avx512_bf16_gemm && serves_avx512_bf16()) some.push_back(avx512_bf16_gemm);
    if (amx_gemm && serves_amx()) some.push_back(amx_gemm);
    some.push_back(nullptr);
    return some;
  }();
  return all;
}

std::atomic<const Gemm*>& chosen() {
  static std::atomic<const Gemm*> gemm{narrow_gemms().size() > 1 ? narrow_gemms().end()[-2] : &avx2_gemm};
  return gemm;
}
#endif

}  // namespace

#ifdef __x86_64__
bool product_advised(Storage storage) {
  if (storage == Storage::bf16) return &narrow_gemm() != &avx2_gemm;
  return serves_avx2() && __builtin_cpu_is("amd") && !serves_avx512();
}

const Gemm& narrow_gemm() { return *chosen().load(); }

const Gemm* const* available_narrow_gemms() { return narrow_gemms().data(); }

void set_narrow_gemm(const char* name) { chosen().store(named("narrow_gemm", available_narrow_gemms(), name)); }

void product(const Product& p, int threads) {
  require(serves_avx2(), "product needs a processor with AVX2 and FMA");
  require(threads >= 1, "threads must be >= 1, got ", threads);
  require(p.m >= 0 && p.n >= 0 && p.k >= 1, "sizes must be >= 0, k >= 1, got ", p.m, ", ", p.n, ", ", p.k);
  if (p.m == 0 || p.n == 0) return;
  check("a", p.a, p.m, p.k);
  check("b", p.b, p.k, p.n);
  check_pointer("c", p.c, sizeof *p.c);
  require(p.m == 1 || p.stride >= p.n, "c must have a row stride >= its columns");

  const bool narrow = p.a.storage == Storage::bf16 && p.b.storage == Storage::bf16;
  const Gemm& gemm = narrow ? narrow_gemm() : avx2_gemm;
  // a slice of C for each thread: packing an element costs about as much as forty of its products
  constexpr int64_t kPacking = 40, kLeast = 1 << 20;
  const int64_t most = std::clamp<int64_t>(p.m * p.n * p.k / kLeast, 1, threads);
  int64_t height = p.m, width = p.n, best = 0;
  for (int64_t down = 1; down <= most; down++) {
    const int64_t h = slice(p.m, down, gemm.tall), w = slice(p.n, most / down, gemm.wide);
    const int64_t cost = h * w + kPacking * (h + w);
    if (best == 0 || cost < best) best = cost, height = h, width = w;
  }
  const int64_t across = (p.n + width - 1) / width, items = (p.m + height - 1) / height * across;
  const size_t each = gemm.packed(width);
  char* packed = scratch(size_t(items) * each);
#pragma omp parallel for num_threads(int(most)) schedule(static)
  for (int64_t item = 0; item < items; item++) {
    const int64_t i = item / across * height, j = item % across * width;
    Product part = p;
    part.a = from(p.a, i, 0), part.b = from(p.b, 0, j), part.c += i * p.stride + j;
    part.m = std::min(height, p.m - i), part.n = std::min(width, p.n - j);
    gemm.product(part, packed + size_t(item) * each);
  }
}
#else
void product(const Product&, int) { require(false, "product serves x86-64 alone"); }
bool product_advised(Storage) { return false; }
const Gemm& narrow_gemm() {
  static const Gemm none{"none", 0, 0, nullptr, nullptr};
  return none;
}
void set_narrow_gemm(const char*) { require(false, "narrow_gemm serves x86-64 alone"); }
const Gemm* const* available_narrow_gemms() {
  static const Gemm* const none = nullptr;
  return &none;
}
#endif

}  // namespace align
