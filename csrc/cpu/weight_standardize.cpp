// Weight standardization of the filters of many layers, forward and backward. A filter is one task:
// its statistics, then its elements while they are in cache.

#include "bitkern/weight_standardize.h"

#include "moments.h"
#include "parallel.h"

namespace bitkern::cpu::BITKERN_ISA {
namespace {

// Vectors whose lanes lie `stride` elements apart.

template <class T, class Lanes>
inline Vec load(const T* p, int64_t stride, Lanes lanes) {
  if (stride == 1) return load(p, lanes);
  T values[WIDTH] = {};
  for (int i = 0; i < size(lanes); ++i) values[i] = p[i * stride];
  return load(values);
}

template <class T, class Lanes>
inline void store(T* p, int64_t stride, Vec v, Lanes lanes) {
  if (stride == 1) return store(p, v, lanes);
  T values[WIDTH];
  store(values, v);
  for (int i = 0; i < size(lanes); ++i) p[i * stride] = values[i];
}

// body(offset in weight, stride, offset in out, stride, lanes) over the elements of a filter. Where
// the layouts differ, the lanes are input channels, adjacent in the tensor that is channels_last.
template <class Body>
inline void for_filter(const WeightStandardizeLayer& layer, Body&& body) {
  const int64_t inner = layer.inner, taps = layer.taps;
  if (layer.weight_channels_last == layer.out_channels_last || inner == 1 || taps == 1) {
    for_vectors(inner * taps, [&](int64_t i, auto lanes) { body(i, 1, i, 1, lanes); });
    return;
  }
  for_vectors(inner, [&](int64_t i, auto lanes) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t last = tap * inner + i, first = i * taps + tap;
      if (layer.out_channels_last) body(first, taps, last, 1, lanes);
      else body(last, 1, first, taps, lanes);
    }
  });
}

template <class T>
double gain_of(const WeightStandardizeLayer& layer, int64_t filter) {
  return layer.gain ? load(static_cast<const T*>(layer.gain) + filter, 1)[0] : 1;
}

template <class T, class Out>
void forward(const WeightStandardize& variant, const WeightStandardizeLayer& layer,
             int64_t filter) {
  const int64_t length = layer.inner * layer.taps;
  const T* weight = static_cast<const T*>(layer.weight) + filter * length;
  Out* out = static_cast<Out*>(layer.out) + filter * length;
  const Moments stats = moments(length, [=](int64_t i, auto lanes) { return load(weight + i, lanes); });
  const double var = stats.m2 / double(length - variant.unbiased);
  const double std = __builtin_sqrt(variant.eps_outside ? var : var + variant.eps);
  const double denominator = variant.eps_outside ? std + variant.eps : std;
  layer.mean[filter] = float(stats.mean);
  layer.std[filter] = float(std);
  const Vec mean = broadcast(float(stats.mean));
  const Vec factor = broadcast(float(gain_of<T>(layer, filter) * layer.scale / denominator));
  for_filter(layer, [=](int64_t i, int64_t stride, int64_t j, int64_t out_stride, auto lanes) {
    store(out + j, out_stride, (load(weight + i, stride, lanes) - mean) * factor, lanes);
  });
}

// With c = weight - mean and d the denominator:
// dweight = gain * scale / d * (dout - mean(dout) - c * sum(dout * c) / (std * d * K)).
template <class T, class Out>
void backward(const WeightStandardize& variant, const WeightStandardizeLayer& layer,
              int64_t filter) {
  const int64_t length = layer.inner * layer.taps;
  const T* weight = static_cast<const T*>(layer.weight) + filter * length;
  const Out* dout = static_cast<const Out*>(layer.dout) + filter * length;
  T* dweight = static_cast<T*>(layer.dweight) + filter * length;
  const Vec mean = broadcast(layer.mean[filter]);
  Vec sums = {}, products = {};
  for_filter(layer, [&](int64_t i, int64_t stride, int64_t j, int64_t out_stride, auto lanes) {
    const Vec g = load(dout + j, out_stride, lanes);
    sums += g;
    products = fma(g, load(weight + i, stride, lanes) - mean, products);
  });
  const double std = layer.std[filter];
  const double denominator = variant.eps_outside ? std + variant.eps : std;
  const double product = sum(products);
  const double projection = product / (std * denominator * double(length - variant.unbiased));
  // A constant filter with eps outside the root: sqrt has no slope there, and c is 0.
  const Vec slope = broadcast(variant.eps_outside && std == 0 ? 0.0f : float(projection));
  const Vec dout_mean = broadcast(sum(sums) / float(length));
  const Vec factor = broadcast(float(gain_of<T>(layer, filter) * layer.scale / denominator));
  for_filter(layer, [=](int64_t i, int64_t stride, int64_t j, int64_t out_stride, auto lanes) {
    const Vec centered = load(weight + i, stride, lanes) - mean;
    const Vec g = load(dout + j, out_stride, lanes) - dout_mean;
    store(dweight + i, stride, (g - centered * slope) * factor, lanes);
  });
  if (layer.dgain) {
    const float dgain = float(layer.scale * product / denominator);
    store(static_cast<T*>(layer.dgain) + filter, broadcast(dgain), 1);
  }
}

// body(layer, filter) for every filter; a thread gets a run of filters with its share of elements.
template <class Body>
void for_filters(const WeightStandardizeLayer* layers, int64_t count, int num_threads,
                 Body&& body) {
  int64_t elements = 0;
  for (int64_t i = 0; i < count; ++i) {
    elements += layers[i].filters * layers[i].inner * layers[i].taps;
  }
  parallel(useful_threads(num_threads, elements), [&](const Team& team) {
    const Range mine = team.share(elements);
    int64_t start = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t length = layers[i].inner * layers[i].taps;
      for (int64_t filter = 0; filter < layers[i].filters; ++filter, start += length) {
        if (start >= mine.begin && start < mine.end) body(layers[i], filter);
      }
    }
  });
}

}  // namespace

void weight_standardize_forward(const WeightStandardize& variant,
                                const WeightStandardizeLayer* layers, int64_t count,
                                int num_threads) {
  with_dtype(variant.weight_dtype, [&](auto t) {
    with_dtype(variant.out_dtype, [&](auto out) {
      for_filters(layers, count, num_threads, [&](const auto& layer, int64_t filter) {
        forward<decltype(t), decltype(out)>(variant, layer, filter);
      });
    });
  });
}

void weight_standardize_backward(const WeightStandardize& variant,
                                 const WeightStandardizeLayer* layers, int64_t count,
                                 int num_threads) {
  with_dtype(variant.weight_dtype, [&](auto t) {
    with_dtype(variant.out_dtype, [&](auto out) {
      for_filters(layers, count, num_threads, [&](const auto& layer, int64_t filter) {
        backward<decltype(t), decltype(out)>(variant, layer, filter);
      });
    });
  });
}

}  // namespace bitkern::cpu::BITKERN_ISA
