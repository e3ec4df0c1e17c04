// From storage codes to types: call(T{}, plain) or call(T{}, U{}, plain), each as a value of its type.
#pragma once
#include <type_traits>

#include "portable.h"
#include "tile.h"

namespace align_cuda {

inline bool is_plain(const Logits& in) { return !in.bias && in.softcap == 0 && in.scale > 0; }

template <class Call>
int with_types(const Logits& in, Call call) {
  auto with = [&](auto z) { return is_plain(in) ? call(z, std::true_type{}) : call(z, std::false_type{}); };
  return in.storage == Storage::f32 ? with(float{}) : in.storage == Storage::bf16 ? with(Bf16{}) : with(F16{});
}

// Gradients have the logits' dtype, or 16 bits where those have 32.
template <class Call>
int with_types(const Logits& in, const Out& out, Call call) {
  return with_types(in, [&](auto z, auto plain) {
    if constexpr (std::is_same_v<decltype(z), float>) {
      if (out.storage == Storage::bf16) return call(z, Bf16{}, plain);
      if (out.storage == Storage::f16) return call(z, F16{}, plain);
    }
    return call(z, z, plain);
  });
}

}  // namespace align_cuda
