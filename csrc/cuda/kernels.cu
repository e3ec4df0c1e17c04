// The kernels as the GPU runs them: a block for each row, unit or stretch of columns.
#include "kernels.h"

#include <cuda_runtime.h>

#include "dispatch.h"

namespace align_cuda {
namespace {

template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const Logits in, State* state) {
  Block<kThreads> block;
  forward_row<T, kPlain>(block, in, state, blockIdx.x);
}

template <class T, class U, bool kPlain, bool kBare>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const Logits in, const Gradient grad) {
  Block<kThreads> block;
  backward_row<T, U, kPlain, kBare>(block, in, grad, blockIdx.x);
}

template <class T, class U, bool kPlain, bool kBare>
__global__ void __launch_bounds__(kFusedThreads, 1)
    token_loss_kernel(const Logits in, State* state, const Out out, const TokenLoss loss, int room) {
  extern __shared__ __align__(16) unsigned char shared[];
  Block<kFusedThreads> block;
  token_loss_row<T, U, kPlain, kBare>(block, in, state, out, loss, blockIdx.x, shared, room);
}

template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads, 2) peaks_kernel(const Logits in, const Peaks peaks) {
  Block<kThreads> block;
  peaks_columns<T, kPlain>(block, in, peaks, blockIdx.x);
}

__global__ void __launch_bounds__(kThreads, 2) unit_loss_kernel(const UnitLoss loss) {
  Block<kThreads> block;
  unit_loss_unit(block, loss, blockIdx.x);
}

cudaStream_t stream_of(Queue queue) { return static_cast<cudaStream_t>(queue.stream); }

}  // namespace

int forward(const Logits& in, State* state, Queue queue) {
  if (int error = cudaSetDevice(queue.device)) return error;
  return with_types(in, [&](auto z, auto plain) {
    forward_kernel<decltype(z), plain.value><<<unsigned(in.rows), kThreads, 0, stream_of(queue)>>>(in, state);
    return int(cudaGetLastError());
  });
}

int backward(const Logits& in, const Gradient& grad, Queue queue) {
  if (int error = cudaSetDevice(queue.device)) return error;
  return with_types(in, grad.out, of_entropy(grad), [&](auto z, auto dz, auto plain, auto bare) {
    backward_kernel<decltype(z), decltype(dz), plain.value, bare.value>
        <<<unsigned(in.rows), kThreads, 0, stream_of(queue)>>>(in, grad);
    return int(cudaGetLastError());
  });
}

int peaks(const Logits& in, const Peaks& peaks, Queue queue) {
  if (int error = cudaSetDevice(queue.device)) return error;
  const unsigned blocks = unsigned((in.cols + kThreads - 1) / kThreads);
  return with_types(in, [&](auto z, auto plain) {
    peaks_kernel<decltype(z), plain.value><<<blocks, kThreads, 0, stream_of(queue)>>>(in, peaks);
    return int(cudaGetLastError());
  });
}

int token_loss(const Logits& in, State* state, const Out& out, const TokenLoss& loss, int64_t shared, Queue queue) {
  int most = 0;
  if (int error = cudaSetDevice(queue.device)) return error;
  if (int error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, queue.device)) return error;
  return with_types(in, out, of_entropy(loss), [&](auto z, auto dz, auto plain, auto bare) {
    auto kernel = token_loss_kernel<decltype(z), decltype(dz), plain.value, bare.value>;
    cudaFuncAttributes of;
    if (int error = cudaFuncGetAttributes(&of, kernel)) return error;
    int64_t bytes = most - int64_t(of.sharedSizeBytes), row = in.cols * int64_t(sizeof z);
    bytes = (shared < 0 || shared > bytes ? bytes : shared) / 16 * 16;
    if (bytes > row) bytes = (row + 15) / 16 * 16;
    if (int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes))) return error;
    kernel<<<unsigned(in.rows), kFusedThreads, size_t(bytes), stream_of(queue)>>>(in, state, out, loss, int(bytes / 16));
    return int(cudaGetLastError());
  });
}

int unit_loss(const UnitLoss& loss, Queue queue) {
  if (int error = cudaSetDevice(queue.device)) return error;
  unit_loss_kernel<<<unsigned(loss.units), kThreads, 0, stream_of(queue)>>>(loss);
  return int(cudaGetLastError());
}

int device_count(int* count) {
  *count = 0;
  return int(cudaGetDeviceCount(count));
}
const char* error_name(int error) { return cudaGetErrorName(cudaError_t(error)); }
const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace align_cuda
