// From storage codes and options to types: call(T{}, plain) or call(T{}, U{}, plain, bare), each a value of its type.
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

// Gradients have the logits' dtype, or 16 bits where those have 32. `entropy`: whether that has a gradient.
template <class Call>
int with_types(const Logits& in, const Out& out, bool entropy, Call call) {
  return with_types(in, [&](auto z, auto plain) {
    auto with = [&](auto dz) {
      const bool bare = !entropy && !(out.limit < INFINITY);
      return bare ? call(z, dz, plain, std::true_type{}) : call(z, dz, plain, std::false_type{});
    };
    if constexpr (std::is_same_v<decltype(z), float>) {
      if (out.storage == Storage::bf16) return with(Bf16{});
      if (out.storage == Storage::f16) return with(F16{});
    }
    return with(z);
  });
}

inline bool of_entropy(const Gradient& grad) { return grad.g_entropy != nullptr; }
inline bool of_entropy(const TokenLoss& loss) { return loss.kind == Token::ppo_clip && loss.entropy_coef != 0; }

}  // namespace align_cuda
