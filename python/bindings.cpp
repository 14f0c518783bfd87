// The module bitkern._C: addresses in, launchers called with the GIL released, nothing else.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bitkern/cpu.h"
#include "bitkern/group_norm_act.h"
#include "bitkern/weight_standardize.h"

namespace py = pybind11;
using namespace bitkern;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

GroupNormAct group_norm_act(int64_t batch, int64_t channels, int64_t pixels, int64_t groups,
                            bool channels_last, int dtype, int weight_dtype, int bias_dtype, int act) {
  return {batch,           channels,
          pixels,          groups,
          channels_last,   DType(dtype),
          DType(weight_dtype), DType(bias_dtype),
          Activation(act)};
}

// filters, inner, taps, scale, weight_channels_last, out_channels_last,
// weight, gain, mean, std, out, dout, dweight, dgain
using LayerTuple = std::tuple<int64_t, int64_t, int64_t, float, bool, bool, Address, Address,
                              Address, Address, Address, Address, Address, Address>;

std::vector<WeightStandardizeLayer> layers_of(const std::vector<LayerTuple>& tuples) {
  std::vector<WeightStandardizeLayer> layers;
  layers.reserve(tuples.size());
  for (const auto& [filters, inner, taps, scale, weight_channels_last, out_channels_last, weight,
                    gain, mean, std, out, dout, dweight, dgain] : tuples) {
    layers.push_back({filters, inner, taps, scale, weight_channels_last, out_channels_last,
                      at<const void>(weight), at<const void>(gain), at<float>(mean),
                      at<float>(std), at<void>(out), at<const void>(dout), at<void>(dweight),
                      at<void>(dgain)});
  }
  return layers;
}

// `how` is what a launcher takes last: the number of threads, or the stream.
template <auto launch, class How>
void def_weight_standardize(py::module_& m, const char* name) {
  m.def(name, [](float eps, bool eps_outside, bool unbiased, int weight_dtype, int out_dtype,
                 const std::vector<LayerTuple>& tuples, How how) {
    const auto layers = layers_of(tuples);
    py::gil_scoped_release release;
    const WeightStandardize variant{eps, eps_outside, unbiased, DType(weight_dtype),
                                    DType(out_dtype)};
    const auto count = static_cast<int64_t>(layers.size());
    if constexpr (std::is_same_v<How, Address>) {
      launch(variant, layers.data(), count, at<void>(how));
    } else {
      launch(variant, layers.data(), count, how);
    }
  });
}

void def_cpu(py::module_ m) {
  m.def("isa", &cpu::isa);
  m.def("group_norm_act_forward",
        [](int64_t batch, int64_t channels, int64_t pixels, int64_t groups, bool channels_last,
           int dtype, int weight_dtype, int bias_dtype, int act, Address x, Address residual,
           Address weight, Address bias, float eps, Address total, Address y, Address mean,
           Address rstd, bool normalized, int num_threads) {
          py::gil_scoped_release release;
          cpu::group_norm_act_forward(
              group_norm_act(batch, channels, pixels, groups, channels_last, dtype, weight_dtype,
                             bias_dtype, act),
              {at<const void>(x), at<const void>(residual), at<const void>(weight),
               at<const void>(bias), eps, at<void>(total), at<void>(y), at<float>(mean),
               at<float>(rstd), normalized},
              num_threads);
        });
  m.def("group_norm_act_backward",
        [](int64_t batch, int64_t channels, int64_t pixels, int64_t groups, bool channels_last,
           int dtype, int weight_dtype, int bias_dtype, int act, Address dy, Address dtotal,
           Address total, Address weight, Address bias, Address mean, Address rstd, Address dx,
           Address dweight, Address dbias, int num_threads) {
          py::gil_scoped_release release;
          cpu::group_norm_act_backward(
              group_norm_act(batch, channels, pixels, groups, channels_last, dtype, weight_dtype,
                             bias_dtype, act),
              {at<const void>(dy), at<const void>(dtotal), at<const void>(total),
               at<const void>(weight), at<const void>(bias), at<const float>(mean),
               at<const float>(rstd), at<void>(dx), at<void>(dweight), at<void>(dbias)},
              num_threads);
        });
  def_weight_standardize<&cpu::weight_standardize_forward, int>(m, "weight_standardize_forward");
  def_weight_standardize<&cpu::weight_standardize_backward, int>(m, "weight_standardize_backward");
}

#ifdef BITKERN_WITH_CUDA
void def_cuda(py::module_ m) {
  def_weight_standardize<&cuda::weight_standardize_forward, Address>(
      m, "weight_standardize_forward");
  def_weight_standardize<&cuda::weight_standardize_backward, Address>(
      m, "weight_standardize_backward");
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  def_cpu(m.def_submodule("cpu"));
  m.attr("compiler") = __VERSION__;
#ifdef BITKERN_WITH_CUDA
  def_cuda(m.def_submodule("cuda"));
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
