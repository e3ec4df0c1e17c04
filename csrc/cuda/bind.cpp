// Python sees raw addresses and sizes; align_kernels/backends/cuda turns tensors into them. Built as `_cuda` for GPUs, and
// by the tests with emulate.cpp in the kernels' place.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "check.h"

namespace py = pybind11;
using namespace align_cuda;

#ifndef ALIGN_MODULE
#define ALIGN_MODULE _cuda
#endif

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void raise(int error) {
  if (error != 0) throw CudaError(std::string(error_name(error)) + ": " + error_text(error));
}

// No device, and no driver or one that is too old, are no GPU; anything else is an error.
int count_devices() {
  constexpr int kInsufficientDriver = 35, kNoDevice = 100;
  int count = 0, error = device_count(&count);
  if (error == kInsufficientDriver || error == kNoDevice) return 0;
  raise(error);
  return count;
}

}  // namespace

PYBIND11_MODULE(ALIGN_MODULE, m, py::mod_gil_not_used()) {
  m.doc() = "CUDA kernels. Tensors are addresses, 0 for an absent one; dtype 0 is float32, 1 bfloat16, 2 float16.";
  py::register_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);
  m.def("device_count", &count_devices, "GPUs that can be used; 0 without a driver.");

  py::class_<Logits>(m, "Logits", "A tile of raw logits and the head's transform; checked where it is used.", py::module_local())
      .def(py::init([](uintptr_t z, int dtype, int64_t rows, int64_t cols, int64_t stride, uintptr_t targets,
                       int64_t offset, int64_t vocab, uintptr_t bias, double scale, double softcap, double temperature,
                       uintptr_t row_temperature) {
             return Logits{at<void>(z), Storage(dtype), rows, cols, stride, at<int64_t>(targets), offset, vocab,
                           at<float>(bias), scale, softcap, temperature, at<float>(row_temperature), rows, nullptr};
           }),
           py::arg("z"), py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("stride"), py::arg("targets"),
           py::arg("offset"), py::arg("vocab"), py::arg("bias"), py::arg("scale"), py::arg("softcap"),
           py::arg("temperature"), py::arg("row_temperature"))
      .def("take", [](Logits& logits, uintptr_t index, int64_t height) {
             logits.index = at<int64_t>(index), logits.height = height;
           }, "The rows are those of `height` that stand at [rows] indices.", py::arg("index"), py::arg("height"));

  py::class_<Queue>(m, "Queue", "A stream of a device.", py::module_local())
      .def(py::init([](int device, uintptr_t stream) { return Queue{device, at<void>(stream)}; }), py::arg("device"),
           py::arg("stream"));

  py::class_<Out>(m, "Out", "Where dL/dz goes and its clamp; limit = inf for none.", py::module_local())
      .def(py::init([](uintptr_t out, int dtype, int64_t stride, double limit, double prob_above, bool residual) {
             return Out{at<void>(out), Storage(dtype), stride, limit, prob_above, residual};
           }),
           py::arg("out"), py::arg("dtype"), py::arg("stride"), py::arg("limit"), py::arg("prob_above"),
           py::arg("limit_is_residual"));

  py::class_<TokenLoss>(m, "TokenLoss", "A loss of tokens, its side tensors and results.", py::module_local())
      .def(py::init([](int kind, double epsilon_low, double epsilon_high, double delta, double beta,
                       double entropy_coef, bool on_policy, bool kl_by_ratio, uintptr_t old_logps, uintptr_t advantages,
                       uintptr_t ref_logps, uintptr_t weights, uintptr_t scale, uintptr_t value, uintptr_t metrics) {
             return TokenLoss{Token(kind), epsilon_low, epsilon_high, delta, beta, entropy_coef, on_policy, kl_by_ratio,
                              at<float>(old_logps), at<float>(advantages), at<float>(ref_logps), at<float>(weights),
                              at<double>(scale), at<float>(value), at<float>(metrics)};
           }),
           py::kw_only(), py::arg("kind"), py::arg("epsilon_low"), py::arg("epsilon_high"), py::arg("delta"),
           py::arg("beta"), py::arg("entropy_coef"), py::arg("on_policy"), py::arg("kl_by_ratio"), py::arg("old_logps"), py::arg("advantages"),
           py::arg("ref_logps"), py::arg("weights"), py::arg("scale"), py::arg("value"), py::arg("metrics"));

  py::class_<UnitLoss>(m, "UnitLoss", "A loss of sequences or pairs, its side tensors and results.", py::module_local())
      .def(py::init([](int kind, double beta, double label_smoothing, double desirable_weight,
                       double undesirable_weight, uintptr_t state, uintptr_t place, int64_t rows, int64_t units,
                       uintptr_t ref_logps, uintptr_t desirable, uintptr_t kl, uintptr_t scale, uintptr_t value,
                       uintptr_t metrics, uintptr_t g) {
             return UnitLoss{Unit(kind), beta, label_smoothing, desirable_weight, undesirable_weight, at<State>(state),
                             at<int64_t>(place), rows, units, at<float>(ref_logps), at<bool>(desirable), at<float>(kl),
                             at<double>(scale), at<float>(value), at<float>(metrics), at<float>(g)};
           }),
           py::kw_only(), py::arg("kind"), py::arg("beta"), py::arg("label_smoothing"), py::arg("desirable_weight"),
           py::arg("undesirable_weight"), py::arg("state"), py::arg("place"), py::arg("rows"), py::arg("units"),
           py::arg("ref_logps"), py::arg("desirable"), py::arg("kl"), py::arg("scale"), py::arg("value"),
           py::arg("metrics"), py::arg("g"));

  m.def(
      "forward",
      [](const Logits& in, uintptr_t state, const Queue& queue) {
        if (check(in, at<State>(state))) raise(forward(in, at<State>(state), queue));
      },
      "Fold a tile into the state of its rows.", py::arg("logits"), py::arg("state"), py::arg("queue"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "backward",
      [](const Logits& in, uintptr_t state, uintptr_t g_logp, uintptr_t g_entropy, const Out& out, const Queue& queue) {
        const Gradient grad{at<State>(state), at<float>(g_logp), at<float>(g_entropy), out};
        const bool some = check(in, at<State>(state));
        check(in, out);
        if (!some) return;
        check(in, grad);
        raise(backward(in, grad, queue));
      },
      "Write dL/dz of a tile.", py::arg("logits"), py::arg("state"), py::arg("g_logp"), py::arg("g_entropy"),
      py::arg("out"), py::arg("queue"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "peaks",
      [](const Logits& in, uintptr_t state, uintptr_t rows, int64_t count, uintptr_t out, const Queue& queue) {
        const Peaks wanted{at<State>(state), at<int64_t>(rows), count, at<float>(out)};
        if (!check(in, at<State>(state))) return;
        check(in, wanted);
        raise(peaks(in, wanted, queue));
      },
      "Write the largest log-prob of each column over some rows.", py::arg("logits"), py::arg("state"),
      py::arg("rows"), py::arg("count"), py::arg("out"), py::arg("queue"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "token_loss",
      [](const Logits& in, uintptr_t state, const Out& out, const TokenLoss& loss, int64_t shared, const Queue& queue) {
        const bool some = check(in, at<State>(state));
        check(in, out);
        if (!some) return;
        check(in, loss);
        raise(token_loss(in, at<State>(state), out, loss, shared, queue));
      },
      "Statistics, coefficient and dL/dz of whole rows.", py::arg("logits"), py::arg("state"), py::arg("out"),
      py::arg("loss"), py::arg("shared"), py::arg("queue"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "unit_loss",
      [](const UnitLoss& loss, const Queue& queue) {
        if (check(loss)) raise(unit_loss(loss, queue));
      },
      "Sums over sequences, and the coefficient of each row.", py::arg("loss"), py::arg("queue"),
      py::call_guard<py::gil_scoped_release>());
}
