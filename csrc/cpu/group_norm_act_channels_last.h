#pragma once

// GroupNorm + activation on [batch, pixels, channels]. A unit is a sample, a block a run of pixels,
// a part a group. Partial results are per channel, with the channels along the vector.

#include "group_norm_act.h"
#include "moments.h"

namespace bitkern::cpu::BITKERN_ISA {
namespace {

struct ChannelsLast {
  // y = act(SCALE * (x - MEAN) + BIAS)
  enum { MEAN, SCALE, BIAS };
  GroupNormActProblem shape;
  Affine affine;
  int64_t group_size;      // channels per group
  int64_t padded;          // channels, rounded up to vectors
  int64_t pixels_a_block;  // a multiple of the 8 that are reduced together
  int64_t coefficients;    // of the elementwise pass
  int64_t units, blocks, parts, slot_size;

  // A slot has rows of `padded` floats: two of doubles for the totals, the coefficients, and two of
  // partial results per block.
  ChannelsLast(const GroupNormActProblem& shape, const Affine& affine, int64_t coefficients)
      : shape(shape),
        affine(affine),
        group_size(shape.channels / shape.groups),
        padded((shape.channels + WIDTH - 1) / WIDTH * WIDTH),
        coefficients(coefficients) {
    const int64_t elements = shape.pixels * shape.channels;
    const int64_t target = elements / 64 > BLOCK ? elements / 64 : BLOCK;
    const int64_t pixels = target / shape.channels;
    pixels_a_block = pixels > 0 ? (pixels + 7) / 8 * 8 : 8;
    units = shape.batch;
    blocks = (shape.pixels + pixels_a_block - 1) / pixels_a_block;
    parts = shape.groups;
    slot_size = whole_lines((4 + coefficients + 2 * blocks) * padded);
  }

  double* total(float* slot, int i) const { return reinterpret_cast<double*>(slot) + i * padded; }
  float* coefficient(float* slot, int i) const { return slot + (4 + i) * padded; }
  float* partial(float* slot, int64_t block, int i) const {
    return slot + (4 + coefficients + 2 * block + i) * padded;
  }
  int64_t pixels_of(int64_t block) const {
    const int64_t left = shape.pixels - block * pixels_a_block;
    return left < pixels_a_block ? left : pixels_a_block;
  }
  int64_t offset(int64_t unit, int64_t block) const {
    return (unit * shape.pixels + block * pixels_a_block) * shape.channels;
  }
  // The parameters of a sample.
  const float* weight_of(int64_t unit) const {
    return affine.weight + unit % affine.samples * shape.channels;
  }
  const float* bias_of(int64_t unit) const {
    return affine.bias + unit % affine.samples * shape.channels;
  }
  void prepare_coefficients(float* slot, int64_t unit, Range groups, const float* mean,
                            const float* rstd) const {
    const float* const weight = weight_of(unit);
    const float* const bias = bias_of(unit);
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      for (int64_t c = g * group_size; c < (g + 1) * group_size; ++c) {
        coefficient(slot, MEAN)[c] = mean[unit * shape.groups + g];
        coefficient(slot, SCALE)[c] = rstd[unit * shape.groups + g] * weight[c];
        coefficient(slot, BIAS)[c] = bias[c];
      }
    }
  }
};

template <class T, Activation act, bool adds>
struct ForwardChannelsLast : ChannelsLast {
  enum { COEFFICIENTS = BIAS + 1 };
  GroupNormActForward tensors;

  ForwardChannelsLast(const GroupNormActProblem& shape, const Affine& affine,
                      const GroupNormActForward& tensors)
      : ChannelsLast(shape, affine, COEFFICIENTS), tensors(tensors) {}

  void prepare(float* slot, int64_t unit, Range groups) const {
    if (tensors.normalized) prepare_coefficients(slot, unit, groups, tensors.mean, tensors.rstd);
  }

  [[gnu::flatten]] void reduce(float* slot, int64_t unit, int64_t block) const {
    if (tensors.normalized) return;
    const T* x = static_cast<const T*>(tensors.x) + offset(unit, block);
    const int64_t ahead = 8 * shape.channels;
    if (tensors.residual) {
      const T* residual = static_cast<const T*>(tensors.residual) + offset(unit, block);
      T* summed = static_cast<T*>(tensors.summed) + offset(unit, block);
      reduce_rows(slot, block, [=](int64_t i, auto lanes) {
        __builtin_prefetch(x + i + ahead);
        __builtin_prefetch(residual + i + ahead);
        const Vec value = round_to<T>(load(x + i, lanes) + load(residual + i, lanes));
        store(summed + i, value, lanes);
        return value;
      });
    } else {
      reduce_rows(slot, block, [=](int64_t i, auto lanes) {
        __builtin_prefetch(x + i + ahead);
        return load(x + i, lanes);
      });
    }
  }

  template <class Load>
  void reduce_rows(float* slot, int64_t block, Load load_at) const {
    float* const means = partial(slot, block, 0);
    float* const m2s = partial(slot, block, 1);
    const int64_t channels = shape.channels;
    memset(means, 0, 2 * padded * sizeof(float));
    for_rows<8>(0, pixels_of(block), [=](int64_t row, auto rows) {
      for_vectors(channels, [=](int64_t c, auto lanes) {
        Vec values[rows.count];
        for (int r = 0; r < rows.count; ++r) values[r] = load_at((row + r) * channels + c, lanes);
        Vec mean = load(means + c), m2 = load(m2s + c);
        merge(values, float(row), mean, m2);
        store(means + c, mean);
        store(m2s + c, m2);
      });
    });
  }

  void combine(float* slot, int64_t unit, Range groups) const {
    if (tensors.normalized) return;
    double* const mean = total(slot, 0);
    double* const m2 = total(slot, 1);
    const int64_t begin = groups.begin * group_size, end = groups.end * group_size;
    const double pixels = double(shape.pixels);
    for (int64_t c = begin; c < end; ++c) mean[c] = m2[c] = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const float* means = partial(slot, block, 0);
      const double count = double(pixels_of(block));
      for (int64_t c = begin; c < end; ++c) mean[c] += count * means[c];
    }
    for (int64_t c = begin; c < end; ++c) mean[c] /= pixels;
    for (int64_t block = 0; block < blocks; ++block) {
      const float* means = partial(slot, block, 0);
      const float* m2s = partial(slot, block, 1);
      const double count = double(pixels_of(block));
      for (int64_t c = begin; c < end; ++c) {
        const double delta = means[c] - mean[c];
        m2[c] += m2s[c] + count * delta * delta;
      }
    }
    const float* const weight = weight_of(unit);
    const float* const bias = bias_of(unit);
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      const Moments group =
          moments_of_sets(mean + g * group_size, m2 + g * group_size, group_size, pixels);
      const float center = float(group.mean);
      const float rstd = float(1 / __builtin_sqrt(group.m2 / group.count + tensors.eps));
      tensors.mean[unit * shape.groups + g] = center;
      tensors.rstd[unit * shape.groups + g] = rstd;
      for (int64_t c = g * group_size; c < (g + 1) * group_size; ++c) {
        const float scale = rstd * weight[c];
        coefficient(slot, MEAN)[c] = center;
        coefficient(slot, SCALE)[c] = scale;
        // The rounding error of the mean is not small where the mean is large.
        coefficient(slot, BIAS)[c] = bias[c] - scale * float(group.mean - center);
      }
    }
  }

  [[gnu::flatten]] void apply(float* slot, int64_t unit, int64_t block) const {
    const void* input = tensors.residual ? tensors.summed : tensors.x;
    const T* x = static_cast<const T*>(input) + offset(unit, block);
    T* y = static_cast<T*>(tensors.y) + offset(unit, block);
    const T* shortcut = from<T>(tensors.shortcut, offset(unit, block));
    const int64_t channels = shape.channels;
    const float* const means = coefficient(slot, MEAN);
    const float* const scales = coefficient(slot, SCALE);
    const float* const biases = coefficient(slot, BIAS);
    const bool streams = past_cache(bytes_of<T>(shape), static_cast<T*>(tensors.y), channels);
    for_rows<2>(0, pixels_of(block), [=](int64_t row, auto rows) {
      for_vectors(channels, [=](int64_t c, auto lanes) {
        const Vec mean = load(means + c), scale = load(scales + c), bias = load(biases + c);
        for (int r = 0; r < rows.count; ++r) {
          const int64_t i = (row + r) * channels + c;
          __builtin_prefetch(x + i + AHEAD<T>);
          Vec z = fma(load(x + i, lanes) - mean, scale, bias);
          if constexpr (adds) {
            __builtin_prefetch(shortcut + i + AHEAD<T>);
            z += load(shortcut + i, lanes);
          }
          store(y + i, activate<act>(z), lanes, streams);
        }
      });
    });
  }
};

template <class T, Activation act, bool adds>
struct BackwardChannelsLast : ChannelsLast {
  // g = dy * act'(SCALE * (x - MEAN) + BIAS), dx = SCALE * g + SLOPE * (x - MEAN) + SHIFT
  enum { SLOPE = BIAS + 1, SHIFT, COEFFICIENTS };
  GroupNormActBackward tensors;

  BackwardChannelsLast(const GroupNormActProblem& shape, const Affine& affine,
                       const GroupNormActBackward& tensors)
      : ChannelsLast(shape, affine, COEFFICIENTS), tensors(tensors) {}

  void prepare(float* slot, int64_t unit, Range groups) const {
    prepare_coefficients(slot, unit, groups, tensors.mean, tensors.rstd);
  }

  // Sums of g and of g * (x - mean) over the pixels of the block.
  [[gnu::flatten]] void reduce(float* slot, int64_t unit, int64_t block) const {
    const T* x = static_cast<const T*>(tensors.summed) + offset(unit, block);
    const T* dy = static_cast<const T*>(tensors.dy) + offset(unit, block);
    const T* y = from<T>(tensors.y, offset(unit, block));
    float* const sums = partial(slot, block, 0);
    float* const products = partial(slot, block, 1);
    const int64_t channels = shape.channels, ahead = 4 * channels;
    const float* const means = coefficient(slot, MEAN);
    const float* const scales = coefficient(slot, SCALE);
    const float* const biases = coefficient(slot, BIAS);
    memset(sums, 0, 2 * padded * sizeof(float));
    for_rows<4>(0, pixels_of(block), [=](int64_t row, auto rows) {
      for_vectors(channels, [=](int64_t c, auto lanes) {
        const Vec mean = load(means + c), scale = load(scales + c), bias = load(biases + c);
        Vec sum = {}, product = {};
        for (int r = 0; r < rows.count; ++r) {
          const int64_t i = (row + r) * channels + c;
          __builtin_prefetch(x + i + ahead);
          __builtin_prefetch(dy + i + ahead);
          if constexpr (adds) __builtin_prefetch(y + i + ahead);
          const Vec centered = load(x + i, lanes) - mean;
          const Vec z = adds ? load(y + i, lanes) : fma(centered, scale, bias);
          const Vec g = activate_backward<act>(z, load(dy + i, lanes));
          sum += g;
          product = fma(g, centered, product);
        }
        store(sums + c, load(sums + c) + sum);
        store(products + c, load(products + c) + product);
      });
    });
  }

  void combine(float* slot, int64_t unit, Range groups) const {
    double* const sum = total(slot, 0);
    double* const product = total(slot, 1);
    const int64_t begin = groups.begin * group_size, end = groups.end * group_size;
    for (int64_t c = begin; c < end; ++c) sum[c] = product[c] = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const float* sums = partial(slot, block, 0);
      const float* products = partial(slot, block, 1);
      for (int64_t c = begin; c < end; ++c) {
        sum[c] += sums[c];
        product[c] += products[c];
      }
    }
    const double count = double(group_size * shape.pixels);
    const float* const weight = weight_of(unit);
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      const double rstd = tensors.rstd[unit * shape.groups + g];
      double weighted_sum = 0, weighted_product = 0;
      for (int64_t c = g * group_size; c < (g + 1) * group_size; ++c) {
        weighted_sum += weight[c] * sum[c];
        weighted_product += weight[c] * product[c];
        affine.dbias[unit * shape.channels + c] = float(sum[c]);
        affine.dweight[unit * shape.channels + c] = float(rstd * product[c]);
      }
      const float slope = float(-rstd * (rstd * (rstd * weighted_product)) / count);
      const float shift = float(-rstd * weighted_sum / count);
      for (int64_t c = g * group_size; c < (g + 1) * group_size; ++c) {
        coefficient(slot, SLOPE)[c] = slope;
        coefficient(slot, SHIFT)[c] = shift;
      }
    }
  }

  [[gnu::flatten]] void apply(float* slot, int64_t unit, int64_t block) const {
    if (!tensors.dx && !tensors.dshortcut) return;
    const T* x = static_cast<const T*>(tensors.summed) + offset(unit, block);
    const T* dy = static_cast<const T*>(tensors.dy) + offset(unit, block);
    const T* dsummed = from<T>(tensors.dsummed, offset(unit, block));
    const T* y = from<T>(tensors.y, offset(unit, block));
    T* dx = from<T>(tensors.dx, offset(unit, block));
    T* dshortcut = from<T>(tensors.dshortcut, offset(unit, block));
    const int64_t channels = shape.channels;
    const float* const means = coefficient(slot, MEAN);
    const float* const scales = coefficient(slot, SCALE);
    const float* const biases = coefficient(slot, BIAS);
    const float* const slopes = coefficient(slot, SLOPE);
    const float* const shifts = coefficient(slot, SHIFT);
    const int64_t bytes = bytes_of<T>(shape);
    const bool streams = past_cache(bytes, static_cast<T*>(tensors.dx), channels);
    const bool streams_too = past_cache(bytes, static_cast<T*>(tensors.dshortcut), channels);
    for_rows<2>(0, pixels_of(block), [=](int64_t row, auto rows) {
      for_vectors(channels, [=](int64_t c, auto lanes) {
        const Vec mean = load(means + c), scale = load(scales + c), bias = load(biases + c);
        const Vec slope = load(slopes + c), shift = load(shifts + c);
        for (int r = 0; r < rows.count; ++r) {
          const int64_t i = (row + r) * channels + c;
          __builtin_prefetch(x + i + AHEAD<T>);
          __builtin_prefetch(dy + i + AHEAD<T>);
          if constexpr (adds) __builtin_prefetch(y + i + AHEAD<T>);
          const Vec centered = load(x + i, lanes) - mean;
          const Vec z = adds ? load(y + i, lanes) : fma(centered, scale, bias);
          const Vec g = activate_backward<act>(z, load(dy + i, lanes));
          if constexpr (adds) {
            if (dshortcut) store(dshortcut + i, g, lanes, streams_too);
            if (!dx) continue;
          }
          Vec grad = fma(scale, g, fma(slope, centered, shift));
          if (dsummed) grad += load(dsummed + i, lanes);
          store(dx + i, grad, lanes, streams);
        }
      });
    });
  }
};

}  // namespace
}  // namespace bitkern::cpu::BITKERN_ISA
