// GroupNorm + activation, forward and backward: picks the kernel for the layout, the dtype and the
// activation.

#include "bitkern/group_norm_act.h"

#include "group_norm_act_channels_first.h"
#include "group_norm_act_channels_last.h"

namespace bitkern::cpu::BITKERN_ISA {
namespace {

template <Activation act, bool shortcut = false>
struct Act {
  static constexpr Activation value = act;
  static constexpr bool adds = shortcut;
};

// body(T{}, Act<act, adds>{}) for the element type and the activation.
template <class Body>
void with_dtype_and_act(const GroupNormActProblem& shape, bool adds, Body&& body) {
  with_dtype(shape.dtype, [&](auto t) {
    if (adds) return body(t, Act<Activation::relu, true>{});
    if (shape.act == Activation::none) return body(t, Act<Activation::none>{});
    if (shape.act == Activation::relu) return body(t, Act<Activation::relu>{});
    if (shape.act == Activation::silu) return body(t, Act<Activation::silu>{});
    if (shape.act == Activation::leaky_relu) return body(t, Act<Activation::leaky_relu>{});
    if (shape.act == Activation::gelu) return body(t, Act<Activation::gelu>{});
    if (shape.act == Activation::mish) return body(t, Act<Activation::mish>{});
    body(t, Act<Activation::hardswish>{});
  });
}

// A parameter of `n` elements in float; `otherwise` where there is none.
void load_parameter(const void* parameter, DType dtype, float otherwise, int64_t n, float* out) {
  with_dtype(dtype, [&](auto t) {
    const auto* p = static_cast<const decltype(t)*>(parameter);
    for_vectors(n, [=](int64_t i, auto lanes) {
      store(out + i, p ? load(p + i, lanes) : broadcast(otherwise), lanes);
    });
  });
}

// Sums `terms` [batch, channels] over the batch, in order, for channels [begin, end).
void sum_over_batch(const float* terms, int64_t batch, int64_t channels, Range range, void* out,
                    DType dtype) {
  if (!out) return;
  constexpr int64_t CHUNK = 64;
  for (int64_t c = range.begin; c < range.end; c += CHUNK) {
    const int64_t n = range.end - c < CHUNK ? range.end - c : CHUNK;
    double sums[CHUNK] = {};
    for (int64_t sample = 0; sample < batch; ++sample) {
      for (int64_t i = 0; i < n; ++i) sums[i] += terms[sample * channels + c + i];
    }
    float rounded[CHUNK];
    for (int64_t i = 0; i < n; ++i) rounded[i] = float(sums[i]);
    with_dtype(dtype, [&](auto t) {
      auto* p = static_cast<decltype(t)*>(out) + c;
      for_vectors(n, [&](int64_t i, auto lanes) { store(p + i, load(rounded + i, lanes), lanes); });
    });
  }
}

// One pixel per sample is a row of channels in either layout.
bool is_channels_last(const GroupNormActProblem& shape) {
  return shape.channels_last || shape.pixels == 1;
}

}  // namespace

void group_norm_act_forward(const GroupNormActProblem& shape, const GroupNormActForward& tensors,
                            int num_threads) {
  const int64_t elements = shape.batch * shape.channels * shape.pixels;
  if (elements == 0) {
    if (tensors.normalized) return;
    for (int64_t i = 0; i < shape.batch * shape.groups; ++i) {
      tensors.mean[i] = 0;
      tensors.rstd[i] = 1 / __builtin_sqrtf(tensors.eps);
    }
    return;
  }
  const int threads = useful_threads(num_threads, elements);
  const int64_t samples = shape.per_sample ? shape.batch : 1;
  const int64_t parameter_count = samples * shape.channels;
  const Scratch parameters(2 * parameter_count);
  float* const weight = parameters.data;
  float* const bias = weight + parameter_count;
  load_parameter(tensors.weight, shape.weight_dtype, 1, parameter_count, weight);
  load_parameter(tensors.bias, shape.bias_dtype, 0, parameter_count, bias);
  const Affine affine{weight, bias, nullptr, nullptr, samples};
  const auto run = [&](const auto& kernel) {
    const Scratch slots(2 * threads * kernel.slot_size);
    parallel(threads, [&](const Team& team) {
      two_pass(team, kernel, slots.data);
      stream_fence();
    });
  };
  with_dtype_and_act(shape, tensors.shortcut, [&](auto t, auto act) {
    using T = decltype(t);
    if (is_channels_last(shape)) {
      run(ForwardChannelsLast<T, act.value, act.adds>(shape, affine, tensors));
    } else {
      run(ForwardChannelsFirst<T, act.value, act.adds>(shape, affine, tensors));
    }
  });
}

void group_norm_act_backward(const GroupNormActProblem& shape, const GroupNormActBackward& tensors,
                             int num_threads) {
  const int64_t elements = shape.batch * shape.channels * shape.pixels;
  const int64_t batch = elements == 0 ? 0 : shape.batch;
  const int threads = useful_threads(num_threads, elements);
  const int64_t samples = shape.per_sample ? batch : 1;
  const int64_t parameter_count = samples * shape.channels;
  const int64_t terms = shape.per_sample ? 1 : batch;  // summed into a gradient
  const Scratch parameters(2 * parameter_count + 2 * batch * shape.channels);
  float* const weight = parameters.data;
  float* const bias = weight + parameter_count;
  float* const dweight = bias + parameter_count;
  float* const dbias = dweight + batch * shape.channels;
  load_parameter(tensors.weight, shape.weight_dtype, 1, parameter_count, weight);
  load_parameter(tensors.bias, shape.bias_dtype, 0, parameter_count, bias);
  const Affine affine{weight, bias, dweight, dbias, samples};
  const auto reduce_parameters = [&](Range range) {
    sum_over_batch(dweight, terms, parameter_count, range, tensors.dweight, shape.weight_dtype);
    sum_over_batch(dbias, terms, parameter_count, range, tensors.dbias, shape.bias_dtype);
  };
  if (elements == 0) return reduce_parameters({0, parameter_count});
  const auto run = [&](const auto& kernel) {
    const Scratch slots(2 * threads * kernel.slot_size);
    parallel(threads, [&](const Team& team) {
      two_pass(team, kernel, slots.data);
      stream_fence();
      team.barrier();
      reduce_parameters(team.share(parameter_count));
    });
  };
  with_dtype_and_act(shape, tensors.y, [&](auto t, auto act) {
    using T = decltype(t);
    if (is_channels_last(shape)) {
      run(BackwardChannelsLast<T, act.value, act.adds>(shape, affine, tensors));
    } else {
      run(BackwardChannelsFirst<T, act.value, act.adds>(shape, affine, tensors));
    }
  });
}

}  // namespace bitkern::cpu::BITKERN_ISA
