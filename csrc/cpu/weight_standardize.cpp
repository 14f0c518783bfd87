// Weight standardization of the filters of many layers, forward, backward, and backward with a step
// of SGD. A filter is one task: its statistics, then its elements while they are in cache.

#include "bitkern/weight_standardize.h"

#include "moments.h"
#include "parallel.h"

namespace bitkern::cpu::BITKERN_ISA {
namespace {

// [rows, columns] to [columns, rows].
template <class T>
void transpose(const T* from, int64_t rows, int64_t columns, T* to) {
  for_rows<16>(0, rows, [=](int64_t row, auto block) {
    for (int64_t column = 0; column < columns; ++column) {
      for (int r = 0; r < block.count; ++r) {
        to[column * rows + row + r] = from[(row + r) * columns + column];
      }
    }
  });
}

// From one layout of a filter, [inner, taps] or channels_last [taps, inner], to the other.
template <class Layer, class T>
void change_layout(const Layer& layer, bool from_channels_last, const T* from,
                   T* to) {
  if (from_channels_last) transpose(from, layer.taps, layer.inner, to);
  else transpose(from, layer.inner, layer.taps, to);
}

template <class Layer>
bool same_layout(const Layer& layer) {
  return layer.weight_channels_last == layer.out_channels_last || layer.inner == 1 ||
         layer.taps == 1;
}

template <class T>
double gain_of(const WeightStandardizeLayer& layer, int64_t filter) {
  return layer.gain ? load(static_cast<const T*>(layer.gain) + filter, 1)[0] : 1;
}

// `out` is the filter's, in the layout of the weight; `bytes` are those of all outputs.
template <class T, class Out>
[[gnu::flatten]] void forward(const WeightStandardizeProblem& problem,
                              const WeightStandardizeLayer& layer, int64_t filter, Out* out,
                              int64_t bytes) {
  const int64_t length = layer.inner * layer.taps;
  const T* weight = static_cast<const T*>(layer.weight) + filter * length;
  const Moments stats = moments(length, [=](int64_t i, auto lanes) {
    __builtin_prefetch(weight + i + AHEAD<T>);
    return load(weight + i, lanes);
  });
  const double var = stats.m2 / double(length - problem.unbiased);
  const double std = __builtin_sqrt(problem.eps_outside ? var : var + problem.eps);
  const double denominator = problem.eps_outside ? std + problem.eps : std;
  layer.mean[filter] = float(stats.mean);
  layer.std[filter] = float(std);
  const float center = float(stats.mean);
  const Vec mean = broadcast(center);
  const double scale = gain_of<T>(layer, filter) * layer.scale / denominator;
  const Vec factor = broadcast(float(scale));
  // The rounding error of the mean is not small where the mean is large.
  const Vec rest = broadcast(float((center - stats.mean) * scale));
  const bool streams = past_cache(bytes, out, length);
  for_vectors(length, [=](int64_t i, auto lanes) {
    store(out + i, fma(load(weight + i, lanes) - mean, factor, rest), lanes, streams);
  });
}

// With c = weight - mean and d the denominator:
// dweight = gain * scale / d * (dout - mean(dout) - c * sum(dout * c) / (std * d * K)).
struct Gradient {
  double product, denominator;  // product: sum(dout * c)
  Vec mean, minus_slope, shift, factor;

  Vec at(Vec dout, Vec weight) const {
    return fma(weight - mean, minus_slope, dout + shift) * factor;
  }
};

// The gradient of a filter; `dout` is in the layout of the weight, `scale` includes the gain.
template <class Problem, class T, class Out>
Gradient gradient(const Problem& problem, float center, double std, double scale, int64_t length,
                  const T* weight, const Out* dout) {
  const Vec mean = broadcast(center);
  Vec sums = {}, products = {}, distances = {};
  for_vectors(length, [&](int64_t i, auto lanes) {
    const Vec g = load(dout + i, lanes);
    const Vec distance = keep(load(weight + i, lanes) - mean, lanes);
    sums += g;
    distances += distance;
    products = fma(g, distance, products);
  });
  // Distances from the rounded mean are the deviations plus `rest`.
  const double rest = sum(distances) / double(length);
  const double denominator = problem.eps_outside ? std + problem.eps : std;
  const double product = sum(products) - rest * sum(sums);
  const double projection = product / (std * denominator * double(length - problem.unbiased));
  // A constant filter with eps outside the root: the root has no slope there, and c is 0.
  const double slope = problem.eps_outside && std == 0 ? 0 : projection;
  return {product,
          denominator,
          mean,
          broadcast(float(-slope)),
          broadcast(float(rest * slope - sum(sums) / double(length))),
          broadcast(float(scale / denominator))};
}

// `dout` is the filter's, in the layout of the weight; `bytes` are those of all of dweight.
template <class T, class Out>
[[gnu::flatten]] void backward(const WeightStandardizeProblem& problem,
                               const WeightStandardizeLayer& layer, int64_t filter,
                               const Out* dout, int64_t bytes) {
  const int64_t length = layer.inner * layer.taps;
  const T* weight = static_cast<const T*>(layer.weight) + filter * length;
  T* dweight = static_cast<T*>(layer.dweight) + filter * length;
  const Gradient gradient =
      BITKERN_ISA::gradient(problem, layer.mean[filter], layer.std[filter],
                            gain_of<T>(layer, filter) * layer.scale, length, weight, dout);
  const bool streams = past_cache(bytes, dweight, length);
  for_vectors(length, [=](int64_t i, auto lanes) {
    store(dweight + i, gradient.at(load(dout + i, lanes), load(weight + i, lanes)), lanes, streams);
  });
  if (layer.dgain) {
    const float dgain = float(layer.scale * gradient.product / gradient.denominator);
    store(static_cast<T*>(layer.dgain) + filter, broadcast(dgain), 1);
  }
}

// A step of PyTorch's SGD. `dout` is the filter's, in the layout of the weight.
[[gnu::flatten]] void sgd(const WeightStandardizeSgdProblem& problem,
                          const WeightStandardizeSgdLayer& layer, int64_t filter,
                          const float* dout) {
  const int64_t length = layer.inner * layer.taps;
  float* weight = layer.weight + filter * length;
  float* buffer = layer.buffer + filter * length;
  const Gradient gradient = BITKERN_ISA::gradient(problem, layer.mean[filter], layer.std[filter],
                                                  layer.scale, length, weight, dout);
  const Vec decay = broadcast(problem.weight_decay), momentum = broadcast(problem.momentum);
  const Vec share = broadcast(1 - problem.dampening), minus_lr = broadcast(-*problem.lr);
  const bool nesterov = problem.nesterov;
  for_vectors(length, [=](int64_t i, auto lanes) {
    const Vec w = load(weight + i, lanes);
    const Vec g = fma(w, decay, gradient.at(load(dout + i, lanes), w));
    const Vec mean = fma(load(buffer + i, lanes), momentum, g * share);
    store(buffer + i, mean, lanes);
    store(weight + i, fma(nesterov ? fma(mean, momentum, g) : mean, minus_lr, w), lanes);
  });
}

template <class Layers>
int64_t elements_of(const Layers& layers) {
  int64_t elements = 0;
  for (int64_t i = 0; i < layers.size; ++i) {
    const auto& layer = layers.data[i];
    elements += layer.filters * layer.inner * layer.taps;
  }
  return elements;
}

// body(layer, filter, scratch) for every filter, where `scratch` has room for one. A thread gets a
// run of filters with its share of the elements.
template <class Layers, class Body>
void for_filters(const Layers& layers, int num_threads, Body&& body) {
  const int64_t elements = elements_of(layers);
  int64_t longest = 0;
  for (int64_t i = 0; i < layers.size; ++i) {
    const int64_t length = layers.data[i].inner * layers.data[i].taps;
    if (length > longest) longest = length;
  }
  const int threads = useful_threads(num_threads, elements);
  const Scratch scratch(threads * longest);
  parallel(threads, [&](const Team& team) {
    const Range mine = team.share(elements);
    int64_t start = 0;
    for (int64_t i = 0; i < layers.size; ++i) {
      const auto& layer = layers.data[i];
      const int64_t length = layer.inner * layer.taps;
      for (int64_t filter = 0; filter < layer.filters; ++filter, start += length) {
        if (start < mine.begin || start >= mine.end) continue;
        body(layer, filter, scratch.data + team.rank * longest);
      }
    }
    stream_fence();
  });
}

}  // namespace

void weight_standardize_forward(const WeightStandardizeProblem& problem,
                                const WeightStandardizeLayers& layers, int num_threads) {
  with_dtype(problem.weight_dtype, [&](auto t) {
    with_dtype(problem.out_dtype, [&](auto o) {
      using T = decltype(t);
      using Out = decltype(o);
      const int64_t bytes = elements_of(layers) * int64_t(sizeof(Out));
      const auto body = [&](const auto& layer, int64_t filter, float* scratch) {
        Out* out = static_cast<Out*>(layer.out) + filter * layer.inner * layer.taps;
        if (same_layout(layer)) return forward<T>(problem, layer, filter, out, bytes);
        Out* const other = reinterpret_cast<Out*>(scratch);
        forward<T>(problem, layer, filter, other, 0);
        change_layout(layer, layer.weight_channels_last, other, out);
      };
      for_filters(layers, num_threads, body);
    });
  });
}

void weight_standardize_backward(const WeightStandardizeProblem& problem,
                                 const WeightStandardizeLayers& layers, int num_threads) {
  with_dtype(problem.weight_dtype, [&](auto t) {
    with_dtype(problem.out_dtype, [&](auto o) {
      using T = decltype(t);
      using Out = decltype(o);
      const int64_t bytes = elements_of(layers) * int64_t(sizeof(T));
      const auto body = [&](const auto& layer, int64_t filter, float* scratch) {
        const Out* dout = static_cast<const Out*>(layer.dout) + filter * layer.inner * layer.taps;
        if (same_layout(layer)) return backward<T>(problem, layer, filter, dout, bytes);
        Out* const other = reinterpret_cast<Out*>(scratch);
        change_layout(layer, layer.out_channels_last, dout, other);
        backward<T>(problem, layer, filter, static_cast<const Out*>(other), bytes);
      };
      for_filters(layers, num_threads, body);
    });
  });
}

void weight_standardize_sgd(const WeightStandardizeSgdProblem& problem,
                            const WeightStandardizeSgdLayers& layers, int num_threads) {
  for_filters(layers, num_threads, [&](const auto& layer, int64_t filter, float* scratch) {
    const float* dout = layer.dout + filter * layer.inner * layer.taps;
    if (same_layout(layer)) return sgd(problem, layer, filter, dout);
    change_layout(layer, layer.out_channels_last, dout, scratch);
    sgd(problem, layer, filter, scratch);
  });
}

}  // namespace bitkern::cpu::BITKERN_ISA
