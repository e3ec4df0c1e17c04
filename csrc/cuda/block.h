// A block of threads, on the GPU and emulated. A kernel is a sequence of phases: `each` runs one for every thread, what a
// thread keeps between phases stands in an `Each`, and all that threads tell each other goes through `warps` and `once`.
#pragma once
#include "portable.h"
#ifndef __CUDACC__
#include <vector>
#endif

namespace align_cuda {

#ifdef __CUDACC__
template <int kThreads>
struct Block {
  static constexpr int kWarps = kThreads / 32;

  template <class T>
  struct Each {
    T value;
    ALIGN_FN T& operator[](int) { return value; }
  };

  // The sums of every warp: [kWarps], visible to all threads. One call per type and kernel: its memory is static.
  template <class T, class Merge>
  ALIGN_FN const T* warps(Each<T>& x, Merge merge) {
    static_assert(sizeof(T) % 4 == 0, "moved as words");
    __shared__ T parts[kWarps];
    T value = x.value;
    ALIGN_UNROLL
    for (int distance = 16; distance; distance /= 2) {
      T other;
      ALIGN_UNROLL
      for (int word = 0; word < int(sizeof(T) / 4); word++)
        reinterpret_cast<uint32_t*>(&other)[word] =
            __shfl_xor_sync(0xffffffffu, reinterpret_cast<const uint32_t*>(&value)[word], distance);
      value = merge(value, other);
    }
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    return parts;
  }

  // What one thread makes, visible to all. One call per type and kernel.
  template <class T, class Make>
  ALIGN_FN const T& once(Make make) {
    __shared__ T made;
    if (threadIdx.x == 0) made = make();
    __syncthreads();
    return made;
  }

  // Memory that all threads share, one T each; `sync` between writing and reading.
  template <class T>
  ALIGN_FN T* board() {
    __shared__ T places[kThreads];
    return places;
  }

  template <class Phase>
  ALIGN_FN void each(Phase phase) {
    phase(int(threadIdx.x));
  }

  ALIGN_FN void sync() { __syncthreads(); }
};
#else
template <int kThreads>
struct Block {
  static constexpr int kWarps = kThreads / 32;

  template <class T>
  struct Each {
    std::vector<T> values = std::vector<T>(kThreads);
    T& operator[](int thread) { return values[thread]; }
  };

  template <class T, class Merge>
  const T* warps(Each<T>& x, Merge merge) {
    static std::vector<T> parts(kWarps);
    for (int warp = 0; warp < kWarps; warp++) {
      std::vector<T> lanes(x.values.begin() + warp * 32, x.values.begin() + warp * 32 + 32), next(32);
      for (int distance = 16; distance; distance /= 2) {
        for (int lane = 0; lane < 32; lane++) next[lane] = merge(lanes[lane], lanes[lane ^ distance]);
        lanes = next;
      }
      parts[warp] = lanes[0];
    }
    return parts.data();
  }

  template <class T, class Make>
  const T& once(Make make) {
    static T made;
    made = make();
    return made;
  }

  template <class T>
  T* board() {
    static std::vector<T> places(kThreads);
    return places.data();
  }

  template <class Phase>
  void each(Phase phase) {
    for (int thread = 0; thread < kThreads; thread++) phase(thread);
  }

  void sync() {}
};
#endif

}  // namespace align_cuda
