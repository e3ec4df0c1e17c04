// Python sees raw addresses and sizes; align_kernels/backends/cpu turns tensors into them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "gemm.h"
#include "lists.h"
#include "tile.h"

namespace py = pybind11;
using namespace align;

template <class T>
static T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
static std::vector<std::string> names(const T* const* all) {
  std::vector<std::string> found;
  for (; *all; all++) found.emplace_back((*all)->name);
  return found;
}

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "CPU kernels. Tensors are addresses, 0 for an absent one; dtype 0 is float32, 1 bfloat16.";

  py::class_<Logits>(m, "Logits", "A tile of raw logits and the head's transform; checked where it is used.",
                     py::module_local())
      .def(py::init([](uintptr_t z, int dtype, int64_t rows, int64_t cols, int64_t stride, uintptr_t targets,
                       int64_t offset, int64_t vocab, uintptr_t bias, double scale, double softcap, double temperature,
                       uintptr_t row_temperature) {
             Logits logits{at<void>(z), Storage(dtype), rows, cols, stride};
             logits.targets = at<int64_t>(targets), logits.offset = offset, logits.vocab = vocab;
             logits.bias = at<float>(bias), logits.scale = scale, logits.softcap = softcap;
             logits.temperature = temperature, logits.row_temperature = at<float>(row_temperature);
             logits.height = rows, logits.index = nullptr;
             return logits;
           }),
           py::arg("z"), py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("stride"), py::arg("targets"),
           py::arg("offset"), py::arg("vocab"), py::arg("bias"), py::arg("scale"), py::arg("softcap"),
           py::arg("temperature"), py::arg("row_temperature"))
      .def("take", [](Logits& logits, uintptr_t index, int64_t height) {
             logits.index = at<int64_t>(index), logits.height = height;
           }, "The rows are those of `height` that stand at [rows] indices.", py::arg("index"), py::arg("height"));

  m.def(
      "forward",
      [](const Logits& logits, uintptr_t state, int threads) { forward(logits, at<State>(state), threads); },
      "Fold a tile into the state of its rows.", py::arg("logits"), py::arg("state"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "exponentials",
      [](const Logits& logits, uintptr_t state, uintptr_t reference, uintptr_t out, int dtype, int64_t stride,
         int threads) {
        Exponentials to{at<float>(reference), at<void>(out), Storage(dtype), stride};
        exponentials(logits, at<State>(state), to, threads);
      },
      "The same without a softcap, and write exp(l - reference) of the tile.", py::arg("logits"), py::arg("state"),
      py::arg("reference"), py::arg("out"), py::arg("dtype"), py::arg("stride"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "backward",
      [](const Logits& logits, uintptr_t state, uintptr_t g_logp, uintptr_t g_entropy, double limit, double prob_above,
         bool limit_is_residual, uintptr_t out, int dtype, int64_t stride, int threads) {
        Gradient gradient{at<State>(state), at<float>(g_logp), at<float>(g_entropy), limit, prob_above,
                          limit_is_residual, at<void>(out), Storage(dtype), stride};
        backward(logits, gradient, threads);
      },
      "Write dL/dz of a tile; limit = inf for no clamp.", py::arg("logits"), py::arg("state"), py::arg("g_logp"),
      py::arg("g_entropy"), py::arg("limit"), py::arg("prob_above"), py::arg("limit_is_residual"), py::arg("out"),
      py::arg("dtype"), py::arg("stride"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  py::class_<Lists>(m, "Lists", "Rows that keep few columns each; checked where it is used.", py::module_local())
      .def(py::init([](int64_t rows, uintptr_t begins, uintptr_t ends, uintptr_t columns) {
             return Lists{rows, at<int64_t>(begins), at<int64_t>(ends), at<int32_t>(columns)};
           }),
           py::arg("rows"), py::arg("begins"), py::arg("ends"), py::arg("columns"));

  m.def(
      "survey",
      [](const Logits& logits, uintptr_t state, uintptr_t rows, int64_t count, int64_t first, int64_t every,
         double drop_mass, int64_t steps, int64_t levels, uintptr_t sums, int threads) {
        const Some some{at<State>(state), at<int64_t>(rows), count, first};
        survey(logits, {some, every, drop_mass, steps, levels, at<double>(sums)}, threads);
      },
      "Add what a sample of a tile's columns tells of some rows.", py::arg("logits"), py::arg("state"), py::arg("rows"),
      py::arg("count"), py::arg("first"), py::arg("every"), py::arg("drop_mass"), py::arg("steps"), py::arg("levels"),
      py::arg("sums"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "keep",
      [](const Logits& logits, uintptr_t state, uintptr_t rows, int64_t count, int64_t first, uintptr_t floors,
         uintptr_t begins, uintptr_t rooms, uintptr_t found, uintptr_t columns, uintptr_t z, int threads) {
        const Some some{at<State>(state), at<int64_t>(rows), count, first};
        keep(logits,
             {some, at<float>(floors), at<int64_t>(begins), at<int64_t>(rooms), at<int64_t>(found),
              at<int32_t>(columns), at<float>(z)},
             threads);
      },
      "Append the columns of a tile that reach their rows' floors.", py::arg("logits"), py::arg("state"),
      py::arg("rows"), py::arg("count"), py::arg("first"), py::arg("floors"), py::arg("begins"), py::arg("rooms"),
      py::arg("found"), py::arg("columns"), py::arg("z"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "forward",
      [](const Logits& logits, const Lists& lists, uintptr_t state, int threads) {
        forward(logits, lists, at<State>(state), threads);
      },
      "Fold lists, whose entries are `logits`, into the state of their rows.", py::arg("logits"), py::arg("lists"),
      py::arg("state"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "backward",
      [](const Logits& logits, const Lists& lists, uintptr_t state, uintptr_t g_logp, uintptr_t g_entropy, double limit,
         double prob_above, bool limit_is_residual, uintptr_t out, int threads) {
        Gradient gradient{at<State>(state), at<float>(g_logp), at<float>(g_entropy), limit, prob_above,
                          limit_is_residual, at<void>(out), Storage::f32, 0};
        backward(logits, lists, gradient, threads);
      },
      "Write dL/dz of lists.", py::arg("logits"), py::arg("lists"), py::arg("state"), py::arg("g_logp"),
      py::arg("g_entropy"), py::arg("limit"), py::arg("prob_above"), py::arg("limit_is_residual"), py::arg("out"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "pull",
      [](const Lists& lists, uintptr_t values, uintptr_t w, int dtype, int64_t stride, int64_t width, int64_t first,
         int64_t count, uintptr_t out, int threads) {
        pull(lists, at<float>(values), {at<void>(w), Storage(dtype), stride, width}, first, count, at<float>(out),
             threads);
      },
      "Add to out [rows, width] the sums over a row's columns of its values times their w.", py::arg("lists"),
      py::arg("values"), py::arg("w"), py::arg("dtype"), py::arg("stride"), py::arg("width"), py::arg("first"),
      py::arg("count"), py::arg("out"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "push",
      [](const Lists& lists, uintptr_t values, uintptr_t x, int dtype, int64_t stride, int64_t width, int64_t columns,
         uintptr_t out, bool add, int threads) {
        push(lists, at<float>(values), {at<void>(x), Storage(dtype), stride, width}, columns, at<float>(out), add,
             threads);
      },
      "Write or add to out [columns, width] the sums over the rows that keep a column of their values times their x.",
      py::arg("lists"), py::arg("values"), py::arg("x"), py::arg("dtype"), py::arg("stride"), py::arg("width"),
      py::arg("columns"), py::arg("out"), py::arg("add"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "product",
      [](uintptr_t a, int a_dtype, std::pair<int64_t, int64_t> a_strides, uintptr_t b, int b_dtype,
         std::pair<int64_t, int64_t> b_strides, uintptr_t c, int64_t stride, int64_t m, int64_t n, int64_t k, bool add,
         int threads) {
        product({{at<void>(a), Storage(a_dtype), a_strides.first, a_strides.second},
                 {at<void>(b), Storage(b_dtype), b_strides.first, b_strides.second}, at<float>(c), stride, m, n, k, add},
                threads);
      },
      "C [m, n] (+)= A [m, k] B [k, n] in float32.", py::arg("a"), py::arg("a_dtype"), py::arg("a_strides"),
      py::arg("b"), py::arg("b_dtype"), py::arg("b_strides"), py::arg("c"), py::arg("stride"),
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("add"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def("product_advised", [](int dtype) { return product_advised(Storage(dtype)); },
        "Whether `product` of two such matrices was measured faster than torch.mm in float32 on such a machine.",
        py::arg("dtype"));
  m.def("narrow_gemm", [] { return narrow_gemm().name; }, "What multiplies bfloat16 by bfloat16.");
  m.def("set_narrow_gemm", [](const std::string& name) { set_narrow_gemm(name.c_str()); }, py::arg("name"),
        "Use it in the whole process. ValueError unless it is one of available_narrow_gemms().");
  m.def("available_narrow_gemms", [] { return names(available_narrow_gemms()); },
        "What this machine has for it, ascending.");

  m.def("isa", [] { return isa().name; }, "The instruction set in use.");
  m.def("set_isa", [](const std::string& name) { set_isa(name.c_str()); }, py::arg("name"),
        "Use this instruction set in the whole process. ValueError unless it is one of available_isas().");
  m.def("available_isas",
        [] { return names(available_isas()); },
        "The instruction sets of this machine, ascending.");
}
