#include "check.h"

#include <cmath>

#include "../require.h"

namespace align_cuda {
namespace {

using align::check_pointer;
using align::require;

int64_t size_of(Storage storage) { return storage == Storage::f32 ? 4 : 2; }

void check_storage(const char* name, Storage storage) {
  require(storage == Storage::f32 || storage == Storage::bf16 || storage == Storage::f16, name,
          " dtype code must be 0 (float32), 1 (bfloat16) or 2 (float16), got ", int(storage));
}

// The first address behind a tile of `rows` rows.
uintptr_t end_of(uintptr_t begin, int64_t rows, int64_t cols, int64_t stride, Storage storage) {
  return begin + uintptr_t(((rows - 1) * stride + cols) * size_of(storage));
}

}  // namespace

bool check(const Logits& in, const void* state) {
  constexpr int64_t kMost = INT32_MAX - 64;
  const int64_t n = in.rows, c = in.cols;
  check_storage("z", in.storage);
  require(n >= 0 && c >= 0 && n <= kMost && c <= kMost, "z must have sizes from 0 to ", kMost, ", got ", n, " x ", c);
  require(in.offset >= 0 && c <= in.vocab && in.offset <= in.vocab - c,
          "columns offset .. offset + cols must lie in [0, vocab), got offset ", in.offset, ", cols ", c, ", vocab ",
          in.vocab);
  require(std::isfinite(in.scale), "scale must be finite, got ", in.scale);
  require(std::isfinite(in.softcap) && in.softcap >= 0, "softcap must be finite and > 0, got ", in.softcap);
  if (!in.row_temperature)
    require(std::isfinite(in.temperature) && in.temperature > 0, "temperature must be finite and > 0, got ",
            in.temperature);
  if (n == 0 || c == 0) return false;
  require(in.height == 1 || in.stride >= c, "z must have a row stride >= its ", c, " columns, got ", in.stride);
  check_pointer("z", in.z, size_of(in.storage));
  check_pointer("state", state, 8);
  check_pointer("targets", in.targets, 8);
  if (in.index) check_pointer("rows", in.index, 8);
  if (in.bias) check_pointer("bias", in.bias, 4);
  if (in.row_temperature) check_pointer("temperature", in.row_temperature, 4);
  return true;
}

void check(const Logits& in, const Out& out) {
  check_storage("out", out.storage);
  require(out.limit >= 0, "clamp limit must be >= 0, got ", out.limit);
  require(out.prob_above >= 0 && out.prob_above <= 1, "clamp prob_above must lie in [0, 1], got ", out.prob_above);
  require(out.storage == in.storage || in.storage == Storage::f32,
          "out must have z's dtype or 16 bits where z is float32, got dtype codes ", int(in.storage), " -> ",
          int(out.storage));
  if (in.rows == 0 || in.cols == 0) return;
  require(in.rows == 1 || out.stride >= in.cols, "out must have a row stride >= its ", in.cols, " columns, got ",
          out.stride);
  check_pointer("out", out.out, size_of(out.storage));
  const auto z = reinterpret_cast<uintptr_t>(in.z), to = reinterpret_cast<uintptr_t>(out.out);
  const bool apart = end_of(to, in.rows, in.cols, out.stride, out.storage) <= z ||
                     end_of(z, in.height, in.cols, in.stride, in.storage) <= to;
  const bool same = z == to && in.storage == out.storage && (in.rows == 1 || in.stride == out.stride);
  require(apart || !in.index, "out must not overlap z where some of its rows are taken");
  require(apart || same, "out must be z itself or not overlap it");
}

void check(const Logits& in, const Gradient& grad) {
  check(in, grad.out);
  check_pointer("g_logp", grad.g_logp, 4);
  if (grad.g_entropy) check_pointer("g_entropy", grad.g_entropy, 4);
}

void check(const Logits&, const Peaks& peaks) {
  require(peaks.count >= 1, "rows must name at least one row, got ", peaks.count);
  check_pointer("out", peaks.out, 4);
  check_pointer("rows", peaks.rows, 8);
}

void check(const Logits& in, const TokenLoss& loss) {
  const int kind = int(loss.kind);
  require(kind >= 0 && kind <= 2, "token loss code must be 0 (sft), 1 (ppo_clip) or 2 (grpo), got ", kind);
  require(in.offset == 0 && in.cols == in.vocab, "a fused loss needs whole rows, got columns ", in.offset, " .. ",
          in.offset + in.cols, " of ", in.vocab);
  check_pointer("scale", loss.scale, 8);
  check_pointer("value", loss.value, 4);
  check_pointer("metrics", loss.metrics, 4);
  if (loss.kind == Token::sft) return;
  check_pointer("advantages", loss.advantages, 4);
  if (!loss.on_policy) check_pointer("old_logps", loss.old_logps, 4);
  if (loss.kind == Token::ppo_clip) return;
  check_pointer("weights", loss.weights, 4);
  if (loss.beta != 0) check_pointer("ref_logps", loss.ref_logps, 4);
}

bool check(const UnitLoss& loss) {
  constexpr int64_t kMost = INT32_MAX;
  const int kind = int(loss.kind);
  require(kind >= 0 && kind <= 4, "unit loss code must be 0 .. 3 (dpo sigmoid, robust, hinge, ipo) or 4 (kto), got ",
          kind);
  require(loss.rows >= 0 && loss.units >= 0 && loss.units <= kMost, "rows and units must be >= 0, got ", loss.rows,
          " and ", loss.units);
  if (loss.units == 0) return false;
  check_pointer("ref_logps", loss.ref_logps, 4);
  check_pointer("scale", loss.scale, 8);
  check_pointer("value", loss.value, 4);
  if (loss.rows > 0) {
    check_pointer("state", loss.state, 8);
    check_pointer("place", loss.place, 8);
    check_pointer("g", loss.g, 4);
  }
  if (loss.kind == Unit::kto) {
    check_pointer("desirable", loss.desirable, 1);
    if (loss.kl) check_pointer("kl", loss.kl, 4);
  } else {
    check_pointer("metrics", loss.metrics, 4);
  }
  return true;
}

}  // namespace align_cuda
