// What differs between a GPU and the CPU that emulates it (emulate.cpp): storage types, exp2 and loads of 16 bytes.
#pragma once
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define ALIGN_FN __device__ __forceinline__
#define ALIGN_UNROLL _Pragma("unroll")
#define ALIGN_ROLLED _Pragma("unroll 1")
#else
#include <stdexcept>
#define ALIGN_FN inline
#define ALIGN_UNROLL
#define ALIGN_ROLLED
#endif

namespace align_cuda {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

#ifdef __CUDACC__
ALIGN_FN float exp2_fast(float x) {  // 2 ulp; results below 2^-126 are 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ALIGN_FN float widen(Bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
ALIGN_FN float widen(F16 x) { return __half2float(__ushort_as_half(x.bits)); }
ALIGN_FN void narrow(float x, Bf16& y) { y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
ALIGN_FN void narrow(float x, F16& y) { y.bits = __half_as_ushort(__float2half_rn(x)); }
#else
ALIGN_FN float exp2_fast(float x) { return exp2f(x); }
ALIGN_FN float widen(Bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}
ALIGN_FN float widen(F16 x) {
  _Float16 y;
  memcpy(&y, &x.bits, sizeof y);
  return float(y);
}
ALIGN_FN void narrow(float x, Bf16& y) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  y.bits = x == x ? uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : uint16_t(0x7fff);
}
ALIGN_FN void narrow(float x, F16& y) {
  _Float16 half = _Float16(x);
  memcpy(&y.bits, &half, sizeof half);
}
#endif
ALIGN_FN float widen(float x) { return x; }
ALIGN_FN void narrow(float x, float& y) { y = x; }

// Neighbours that are moved by one instruction: 16 bytes of the logits, as many of the gradient.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T lane[N];
};

template <class P>
ALIGN_FN bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(P) == 0;
}

template <class P>
ALIGN_FN P load_pack(const void* p) {
#ifdef __CUDACC__
  return *static_cast<const P*>(p);
#else
  if (!aligned<P>(p)) throw std::logic_error("a pack is loaded from an address that is not aligned");
  P pack;
  memcpy(&pack, p, sizeof pack);
  return pack;
#endif
}

template <class P>
ALIGN_FN void store_pack(void* p, const P& pack) {
#ifdef __CUDACC__
  *static_cast<P*>(p) = pack;
#else
  if (!aligned<P>(p)) throw std::logic_error("a pack is stored to an address that is not aligned");
  memcpy(p, &pack, sizeof pack);
#endif
}

}  // namespace align_cuda
