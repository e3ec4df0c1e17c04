// The kernels' source on the CPU, thread after thread, for tests: index arithmetic, tails, reductions and formulas are
// those of the GPU; exp2 is the C library's and the order of additions the same.
#include <limits.h>

#include <vector>

#include "dispatch.h"
#include "kernels.h"

namespace align_cuda {

int forward(const Logits& in, State* state, Queue) {
  return with_types(in, [&](auto z, auto plain) {
    Block<kThreads> block;
    for (int64_t row = 0; row < in.rows; row++) forward_row<decltype(z), plain.value>(block, in, state, row);
    return 0;
  });
}

int backward(const Logits& in, const Gradient& grad, Queue) {
  return with_types(in, grad.out, of_entropy(grad), [&](auto z, auto dz, auto plain, auto bare) {
    Block<kThreads> block;
    for (int64_t row = 0; row < in.rows; row++)
      backward_row<decltype(z), decltype(dz), plain.value, bare.value>(block, in, grad, row);
    return 0;
  });
}

int peaks(const Logits& in, const Peaks& peaks, Queue) {
  return with_types(in, [&](auto z, auto plain) {
    Block<kThreads> block;
    for (int64_t i = 0; i * kThreads < in.cols; i++) peaks_columns<decltype(z), plain.value>(block, in, peaks, i);
    return 0;
  });
}

int token_loss(const Logits& in, State* state, const Out& out, const TokenLoss& loss, int64_t shared, Queue) {
  const int64_t bytes = shared < 0 ? 1 << 16 : shared;
  return with_types(in, out, of_entropy(loss), [&](auto z, auto dz, auto plain, auto bare) {
    Block<kFusedThreads> block;
    std::vector<Pack<float, 4>> room(size_t(bytes / 16 + 1));
    for (int64_t row = 0; row < in.rows; row++)
      token_loss_row<decltype(z), decltype(dz), plain.value, bare.value>(
          block, in, state, out, loss, row, room.data(), int(bytes / 16));
    return 0;
  });
}

int unit_loss(const UnitLoss& loss, Queue) {
  Block<kThreads> block;
  for (int64_t unit = 0; unit < loss.units; unit++) unit_loss_unit(block, loss, unit);
  return 0;
}

int emulated_device_error = 0;  // what the driver would say

int device_count(int* count) {
  *count = emulated_device_error ? 0 : 1;
  return emulated_device_error;
}
const char* error_name(int) { return "emulated"; }
const char* error_text(int) { return "an error that the test planted"; }

}  // namespace align_cuda

extern "C" void align_plant_device_error(int error) { align_cuda::emulated_device_error = error; }
