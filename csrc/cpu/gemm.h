// C (+)= A B in float32, for machines whose torch.mm is slow, and for bfloat16, of which torch makes no float32. No
// torch header, as in tile.h.
#pragma once
#include <cstddef>
#include <cstdint>

#include "storage.h"

namespace align {

// C [m, n] with rows `stride` apart; A [m, k] and B [k, n] with an element every `row` and `col` numbers.
struct Matrix {
  const void* data;
  Storage storage;
  int64_t row, col;
};
// Static: a linker that kept the copy of a file with more instructions would give it to all.
static inline Matrix from(const Matrix& x, int64_t i, int64_t j) {
  return {static_cast<const char*>(x.data) + (i * x.row + j * x.col) * size_of(x.storage), x.storage, x.row, x.col};
}
struct Product {
  Matrix a, b;
  float* c;
  int64_t stride, m, n, k;
  bool add;
};

constexpr size_t kLine = 64;  // bytes

// One way to multiply: what threads and memory need to know, and the whole product on one thread.
struct Gemm {
  const char* name;
  int64_t tall, wide;                             // of its tile of C
  size_t (*packed)(int64_t n);                    // bytes that a product of n columns packs into, a multiple of a line
  void (*product)(const Product&, void* packed);  // `packed` is aligned to a line
};

#ifdef __x86_64__
extern const Gemm avx2_gemm;  // any storage, widened where it is packed
// A and B bfloat16, denormals count as zero; null where the compiler did not know the units.
extern const Gemm *const avx512_bf16_gemm, *const amx_gemm;
#endif

// Raises std::invalid_argument. No sum depends on the number of threads.
void product(const Product&, int threads);

// Whether the machine is one on which `product` of such A and B was measured faster than torch.mm in float32.
bool product_advised(Storage);

// What multiplies bfloat16 by bfloat16: "avx2" widens both, others are units of the machine's own.
const Gemm& narrow_gemm();                    // in use
void set_narrow_gemm(const char* name);       // raises std::invalid_argument
const Gemm* const* available_narrow_gemms();  // ascending, ends with null

}  // namespace align
