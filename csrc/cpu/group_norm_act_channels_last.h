#pragma once

// GroupNorm + activation on [batch, pixels, channels]. A unit is a sample, a block a run of pixels,
// a part a group; sums are taken per channel, with the channels along the vector.

#include "group_norm_act.h"
#include "moments.h"

#ifndef PA
#define PA 0
#endif
#ifndef RA
#define RA 4
#endif
#ifndef FP
#define FP 0
#endif
#ifndef FA
#define FA 0
#endif
#ifndef FR
#define FR 8
#endif
#ifndef PF
#define PF 0
#endif
#ifndef RR
#define RR 4
#endif
namespace bitkern::cpu::BITKERN_ISA {
namespace {

struct ChannelsLast {
  GroupNormAct shape;
  Affine affine;
  int64_t width;           // channels per group
  int64_t padded;          // channels, rounded up to vectors
  int64_t pixels_a_block;  // a multiple of the 8 rows that are reduced together
  int64_t units, blocks, parts, slot_size;

  // Rows of `padded` floats in a slot: two of double, the totals; `coefficients`; two per block.
  ChannelsLast(const GroupNormAct& shape, const Affine& affine, int coefficients)
      : shape(shape), affine(affine), width(shape.channels / shape.groups) {
    padded = (shape.channels + WIDTH - 1) / WIDTH * WIDTH;
    const int64_t elements = shape.pixels * shape.channels;
    const int64_t target = elements / 64 > BLOCK ? elements / 64 : BLOCK;
    pixels_a_block = (target / shape.channels + 7) / 8 * 8;
    units = shape.batch;
    blocks = (shape.pixels + pixels_a_block - 1) / pixels_a_block;
    parts = shape.groups;
    slot_size = (4 + coefficients + 2 * blocks) * padded;
  }

  double* total(float* slot, int i) const { return reinterpret_cast<double*>(slot) + i * padded; }
  float* coefficient(float* slot, int i) const { return slot + (4 + i) * padded; }
  float* partial(float* slot, int coefficients, int64_t block, int i) const {
    return slot + (4 + coefficients + 2 * block + i) * padded;
  }
  int64_t pixels_of(int64_t block) const {
    const int64_t left = shape.pixels - block * pixels_a_block;
    return left < pixels_a_block ? left : pixels_a_block;
  }
  int64_t offset(int64_t unit, int64_t block) const {
    return (unit * shape.pixels + block * pixels_a_block) * shape.channels;
  }
};

template <class T, Activation act>
struct ForwardChannelsLast : ChannelsLast {
  static constexpr int MEAN = 0, SCALE = 1, BIAS = 2, COEFFICIENTS = 3;
  GroupNormActForward tensors;

  ForwardChannelsLast(const GroupNormAct& shape, const Affine& affine,
                      const GroupNormActForward& tensors)
      : ChannelsLast(shape, affine, COEFFICIENTS), tensors(tensors) {}

  void prepare(float*, int64_t, Range) const {}

  __attribute__((flatten)) void reduce(float* slot, int64_t unit, int64_t block) const {
    const T* x = static_cast<const T*>(tensors.x) + offset(unit, block);
    if (tensors.residual) {
      const T* residual = static_cast<const T*>(tensors.residual) + offset(unit, block);
      T* total = static_cast<T*>(tensors.total) + offset(unit, block);
      reduce_rows(slot, block, [=](int64_t i, auto lanes) {
        const Vec sum = round_to<T>(load(x + i, lanes) + load(residual + i, lanes));
        store(total + i, sum, lanes);
        return sum;
      }, [=](int64_t i) {__builtin_prefetch(x+i); __builtin_prefetch(residual+i);});
    } else {
      reduce_rows(slot, block, [=](int64_t i, auto lanes) { return load(x + i, lanes); }, [=](int64_t i) {__builtin_prefetch(x+i);});
    }
  }

  template <class Load, class P>
  void reduce_rows(float* slot, int64_t block, Load load_at, P prefetch_at) const {
    float* const means = partial(slot, COEFFICIENTS, block, 0);
    float* const m2s = partial(slot, COEFFICIENTS, block, 1);
    memset(means, 0, 2 * padded * sizeof(float));
    const int64_t channels = shape.channels;
    for_rows<FR>(0, pixels_of(block), [=](int64_t row, auto rows) {
      for_vectors(channels, [=](int64_t c, auto lanes) {
        Vec values[rows.count];
        for (int r = 0; r < rows.count; ++r) { if (FP) prefetch_at((row + r + FP) * channels + c); values[r] = load_at((row + r) * channels + c, lanes); }
        Vec mean = load(means + c), m2 = load(m2s + c);
        merge(values, float(row), mean, m2);
        store(means + c, mean);
        store(m2s + c, m2);
      });
    });
  }

  void combine(float* slot, int64_t unit, Range groups) const {
    double* const mean = total(slot, 0);
    double* const m2 = total(slot, 1);
    const int64_t begin = groups.begin * width, end = groups.end * width;
    const double count = double(shape.pixels);
    for (int64_t c = begin; c < end; ++c) mean[c] = m2[c] = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const float* means = partial(slot, COEFFICIENTS, block, 0);
      const double n = double(pixels_of(block));
      for (int64_t c = begin; c < end; ++c) mean[c] += n * means[c];
    }
    for (int64_t c = begin; c < end; ++c) mean[c] /= count;
    for (int64_t block = 0; block < blocks; ++block) {
      const float* means = partial(slot, COEFFICIENTS, block, 0);
      const float* m2s = partial(slot, COEFFICIENTS, block, 1);
      const double n = double(pixels_of(block));
      for (int64_t c = begin; c < end; ++c) {
        const double delta = means[c] - mean[c];
        m2[c] += m2s[c] + n * delta * delta;
      }
    }
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      const Moments group = moments_of_sets(mean + g * width, m2 + g * width, width, count);
      const float center = float(group.mean);
      const float rstd = float(1 / __builtin_sqrt(group.m2 / group.count + tensors.eps));
      tensors.mean[unit * shape.groups + g] = center;
      tensors.rstd[unit * shape.groups + g] = rstd;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        const float scale = rstd * affine.weight[c];
        coefficient(slot, MEAN)[c] = center;
        coefficient(slot, SCALE)[c] = scale;
        coefficient(slot, BIAS)[c] = affine.bias[c] - scale * float(group.mean - center);
      }
    }
  }

  __attribute__((flatten)) void apply(float* slot, int64_t unit, int64_t block) const {
    const void* input = tensors.residual ? tensors.total : tensors.x;
    const T* x = static_cast<const T*>(input) + offset(unit, block);
    T* y = static_cast<T*>(tensors.y) + offset(unit, block);
    const int64_t channels = shape.channels;
    const float* const means = coefficient(slot, MEAN);
    const float* const scales = coefficient(slot, SCALE);
    const float* const biases = coefficient(slot, BIAS);
    const bool streams = stream_output<T>(shape, tensors.y, shape.channels);
    for_rows<4>(0, pixels_of(block), [=](int64_t row, auto rows) {
      for_vectors(channels, [=](int64_t c, auto lanes) {
        const Vec mean = load(means + c), scale = load(scales + c), bias = load(biases + c);
        for (int r = 0; r < rows.count; ++r) {
          const int64_t i = (row + r) * channels + c;
          if (FA) __builtin_prefetch(x + i + FA * channels);
          const Vec result = activate<act>(fma(load(x + i, lanes) - mean, scale, bias));
          if (streams) stream(y + i, result, lanes);
          else store(y + i, result, lanes);
        }
      });
    });
  }
};

template <class T, Activation act>
struct BackwardChannelsLast : ChannelsLast {
  // dx = SCALE * g + SLOPE * (x - MEAN) + SHIFT
  static constexpr int MEAN = 0, SCALE = 1, BIAS = 2, SLOPE = 3, SHIFT = 4, COEFFICIENTS = 5;
  GroupNormActBackward tensors;

  BackwardChannelsLast(const GroupNormAct& shape, const Affine& affine,
                       const GroupNormActBackward& tensors)
      : ChannelsLast(shape, affine, COEFFICIENTS), tensors(tensors) {}

  void prepare(float* slot, int64_t unit, Range groups) const {
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      const float mean = tensors.mean[unit * shape.groups + g];
      const float rstd = tensors.rstd[unit * shape.groups + g];
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        coefficient(slot, MEAN)[c] = mean;
        coefficient(slot, SCALE)[c] = rstd * affine.weight[c];
        coefficient(slot, BIAS)[c] = affine.bias[c];
      }
    }
  }

  // Sums of g and g * (x - mean) over the block, with g = dy * act'.
  __attribute__((flatten)) void reduce(float* slot, int64_t unit, int64_t block) const {
    const T* x = static_cast<const T*>(tensors.total) + offset(unit, block);
    const T* dy = static_cast<const T*>(tensors.dy) + offset(unit, block);
    float* const sums = partial(slot, COEFFICIENTS, block, 0);
    float* const products = partial(slot, COEFFICIENTS, block, 1);
    memset(sums, 0, 2 * padded * sizeof(float));
    const int64_t channels = shape.channels;
    const float* const means = coefficient(slot, MEAN);
    const float* const scales = coefficient(slot, SCALE);
    const float* const biases = coefficient(slot, BIAS);
    for_rows<RR>(0, pixels_of(block), [=](int64_t row, auto rows) {
      for_vectors(channels, [=](int64_t c, auto lanes) {
        const Vec mean = load(means + c), scale = load(scales + c), bias = load(biases + c);
        Vec sum = {}, product = {};
        for (int r = 0; r < rows.count; ++r) {
          const int64_t i = (row + r) * channels + c;
          if (PF) { __builtin_prefetch(x + i + PF * channels); __builtin_prefetch(dy + i + PF * channels); }
          const Vec centered = load(x + i, lanes) - mean;
          const Vec g = activate_backward<act>(fma(centered, scale, bias), load(dy + i, lanes));
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
    const int64_t begin = groups.begin * width, end = groups.end * width;
    for (int64_t c = begin; c < end; ++c) sum[c] = product[c] = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const float* sums = partial(slot, COEFFICIENTS, block, 0);
      const float* products = partial(slot, COEFFICIENTS, block, 1);
      for (int64_t c = begin; c < end; ++c) {
        sum[c] += sums[c];
        product[c] += products[c];
      }
    }
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      const double rstd = tensors.rstd[unit * shape.groups + g];
      const double count = double(width * shape.pixels);
      double weighted_sum = 0, weighted_product = 0;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        weighted_sum += affine.weight[c] * sum[c];
        weighted_product += affine.weight[c] * product[c];
        affine.dbias[unit * shape.channels + c] = float(sum[c]);
        affine.dweight[unit * shape.channels + c] = float(rstd * product[c]);
      }
      const float slope = float(-rstd * (rstd * (rstd * weighted_product)) / count);
      const float shift = float(-rstd * weighted_sum / count);
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        coefficient(slot, SLOPE)[c] = slope;
        coefficient(slot, SHIFT)[c] = shift;
      }
    }
  }

  __attribute__((flatten)) void apply(float* slot, int64_t unit, int64_t block) const {
    if (!tensors.dx) return;
    const T* x = static_cast<const T*>(tensors.total) + offset(unit, block);
    const T* dy = static_cast<const T*>(tensors.dy) + offset(unit, block);
    T* dx = static_cast<T*>(tensors.dx) + offset(unit, block);
    const T* dtotal = static_cast<const T*>(tensors.dtotal);
    if (dtotal) dtotal += offset(unit, block);
    const int64_t channels = shape.channels;
    const float* const means = coefficient(slot, MEAN);
    const float* const scales = coefficient(slot, SCALE);
    const float* const biases = coefficient(slot, BIAS);
    const float* const slopes = coefficient(slot, SLOPE);
    const float* const shifts = coefficient(slot, SHIFT);
    const bool streams = stream_output<T>(shape, tensors.dx, shape.channels);
    for_rows<RA>(0, pixels_of(block), [=](int64_t row, auto rows) {
      for_vectors(channels, [=](int64_t c, auto lanes) {
        const Vec mean = load(means + c), scale = load(scales + c), bias = load(biases + c);
        const Vec slope = load(slopes + c), shift = load(shifts + c);
        for (int r = 0; r < rows.count; ++r) {
          const int64_t i = (row + r) * channels + c;
          if (PA) { __builtin_prefetch(x + i + PA * channels); __builtin_prefetch(dy + i + PA * channels); }
          const Vec centered = load(x + i, lanes) - mean;
          const Vec g = activate_backward<act>(fma(centered, scale, bias), load(dy + i, lanes));
          Vec grad = fma(scale, g, fma(slope, centered, shift));
          if (dtotal) grad += load(dtotal + i, lanes);
          if (streams) stream(dx + i, grad, lanes);
          else store(dx + i, grad, lanes);
        }
      });
    });
  }
};

}  // namespace
}  // namespace bitkern::cpu::BITKERN_ISA
