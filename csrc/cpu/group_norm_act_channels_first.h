#pragma once

// GroupNorm + activation on [batch, channels, pixels]. A unit is a group of a sample; a block is a
// run of its channels, or a run of pixels of one channel where channels are large. Either way a
// block lies in one piece.

#include "group_norm_act.h"
#include "moments.h"

namespace bitkern::cpu::BITKERN_ISA {
namespace {

struct ChannelsFirst {
  GroupNormActProblem shape;
  Affine affine;
  int64_t group_size;                                 // channels per group
  int64_t parameter_groups;                           // of parameters of each sample, or of all
  int64_t pixels_a_block, channels_a_block, columns;  // a group is cut into `columns` of pixels
  int64_t units, blocks, parts, slot_size;

  // A slot holds pairs of doubles: one per channel and column, and one more.
  ChannelsFirst(const GroupNormActProblem& shape, const Affine& affine)
      : shape(shape),
        affine(affine),
        group_size(shape.channels / shape.groups),
        parameter_groups(affine.samples * shape.groups) {
    pixels_a_block = shape.pixels < 2 * BLOCK ? shape.pixels : BLOCK;
    columns = (shape.pixels + pixels_a_block - 1) / pixels_a_block;
    channels_a_block = shape.pixels < BLOCK ? BLOCK / shape.pixels : 1;
    units = shape.batch * shape.groups;
    blocks = (group_size + channels_a_block - 1) / channels_a_block * columns;
    parts = 1;
    slot_size = whole_lines(4 * (group_size * columns + 1));
  }

  // Channels [first, last) of the group, `pixels` of each from `pixel` on.
  struct Block {
    int64_t first, last, pixel, pixels, column;
  };
  Block block_at(int64_t block) const {
    const int64_t column = block % columns, pixel = column * pixels_a_block;
    const int64_t first = block / columns * channels_a_block, last = first + channels_a_block;
    const int64_t left = shape.pixels - pixel;
    return {first, last < group_size ? last : group_size, pixel,
            left < pixels_a_block ? left : pixels_a_block, column};
  }
  int64_t offset(int64_t unit, int64_t channel, int64_t pixel) const {
    return (unit * group_size + channel) * shape.pixels + pixel;
  }
  // The index of a channel of the unit's group among all parameters.
  int64_t channel(int64_t unit, int64_t c) const {
    return unit % parameter_groups * group_size + c;
  }
  double* pair(float* slot, int64_t i) const { return reinterpret_cast<double*>(slot) + 2 * i; }
};

template <class T, Activation act, bool adds>
struct ForwardChannelsFirst : ChannelsFirst {
  GroupNormActForward tensors;

  ForwardChannelsFirst(const GroupNormActProblem& shape, const Affine& affine,
                       const GroupNormActForward& tensors)
      : ChannelsFirst(shape, affine), tensors(tensors) {}

  void prepare(float* slot, int64_t, Range parts) const {
    if (tensors.normalized && parts.begin != parts.end) pair(slot, group_size * columns)[0] = 0;
  }

  [[gnu::flatten]] void reduce(float* slot, int64_t unit, int64_t index) const {
    if (tensors.normalized) return;
    const Block block = block_at(index);
    const int64_t start = offset(unit, block.first, block.pixel);
    const int64_t length = (block.last - block.first) * block.pixels;
    const T* x = static_cast<const T*>(tensors.x) + start;
    Moments result;
    if (tensors.residual) {
      const T* residual = static_cast<const T*>(tensors.residual) + start;
      T* summed = static_cast<T*>(tensors.summed) + start;
      result = moments(length, [=](int64_t i, auto lanes) {
        __builtin_prefetch(x + i + AHEAD<T>);
        __builtin_prefetch(residual + i + AHEAD<T>);
        const Vec value = round_to<T>(load(x + i, lanes) + load(residual + i, lanes));
        store(summed + i, value, lanes);
        return value;
      });
    } else {
      result = moments(length, [=](int64_t i, auto lanes) {
        __builtin_prefetch(x + i + AHEAD<T>);
        return load(x + i, lanes);
      });
    }
    pair(slot, index)[0] = result.mean;
    pair(slot, index)[1] = result.m2;
  }

  void combine(float* slot, int64_t unit, Range parts) const {
    if (parts.begin == parts.end || tensors.normalized) return;
    Moments group;
    for (int64_t i = 0; i < blocks; ++i) {
      const Block block = block_at(i);
      const double count = double((block.last - block.first) * block.pixels);
      group.merge({count, pair(slot, i)[0], pair(slot, i)[1]});
    }
    tensors.mean[unit] = float(group.mean);
    pair(slot, group_size * columns)[0] = group.mean - tensors.mean[unit];
    tensors.rstd[unit] = float(1 / __builtin_sqrt(group.m2 / group.count + tensors.eps));
  }

  [[gnu::flatten]] void apply(float* slot, int64_t unit, int64_t index) const {
    const Block block = block_at(index);
    const Vec mean = broadcast(tensors.mean[unit]);
    const bool streams = past_cache(bytes_of<T>(shape), static_cast<T*>(tensors.y), shape.pixels);
    const float rest = float(pair(slot, group_size * columns)[0]);
    for (int64_t c = block.first; c < block.last; ++c) {
      const Vec scale = broadcast(tensors.rstd[unit] * affine.weight[channel(unit, c)]);
      const Vec bias = affine.bias[channel(unit, c)] - scale * rest;
      const int64_t start = offset(unit, c, block.pixel);
      const T* x = static_cast<const T*>(tensors.residual ? tensors.summed : tensors.x) + start;
      T* y = static_cast<T*>(tensors.y) + start;
      const T* shortcut = from<T>(tensors.shortcut, start);
      for_vectors(block.pixels, [=](int64_t i, auto lanes) {
        Vec z = fma(load(x + i, lanes) - mean, scale, bias);
        if constexpr (adds) {
          __builtin_prefetch(shortcut + i + AHEAD<T>);
          z += load(shortcut + i, lanes);
        }
        store(y + i, activate<act>(z), lanes, streams);
      });
    }
  }
};

template <class T, Activation act, bool adds>
struct BackwardChannelsFirst : ChannelsFirst {
  GroupNormActBackward tensors;

  BackwardChannelsFirst(const GroupNormActProblem& shape, const Affine& affine,
                        const GroupNormActBackward& tensors)
      : ChannelsFirst(shape, affine), tensors(tensors) {}

  void prepare(float*, int64_t, Range) const {}

  // Sums of g and g * (x - mean) over the block's pixels of a channel, with g = dy * act'.
  [[gnu::flatten]] void reduce(float* slot, int64_t unit, int64_t index) const {
    const Block block = block_at(index);
    const Vec mean = broadcast(tensors.mean[unit]);
    for (int64_t c = block.first; c < block.last; ++c) {
      const Vec scale = broadcast(tensors.rstd[unit] * affine.weight[channel(unit, c)]);
      const Vec bias = broadcast(affine.bias[channel(unit, c)]);
      const int64_t start = offset(unit, c, block.pixel);
      const T* x = static_cast<const T*>(tensors.summed) + start;
      const T* dy = static_cast<const T*>(tensors.dy) + start;
      const T* y = from<T>(tensors.y, start);
      Vec sums[4] = {}, products[4] = {};
      const auto accumulate = [&](int64_t i, auto lanes, int k) {
        __builtin_prefetch(x + i + AHEAD<T>);
        __builtin_prefetch(dy + i + AHEAD<T>);
        if constexpr (adds) __builtin_prefetch(y + i + AHEAD<T>);
        const Vec centered = load(x + i, lanes) - mean;
        const Vec z = adds ? load(y + i, lanes) : fma(centered, scale, bias);
        const Vec g = activate_backward<act>(z, load(dy + i, lanes));
        sums[k] += g;
        products[k] = fma(g, centered, products[k]);
      };
      int64_t i = 0;
      for (; i + 4 * WIDTH <= block.pixels; i += 4 * WIDTH) {
        for (int k = 0; k < 4; ++k) accumulate(i + k * WIDTH, AllLanes{}, k);
      }
      for_vectors(block.pixels - i, [&](int64_t j, auto lanes) { accumulate(i + j, lanes, 0); });
      double* const result = pair(slot, c * columns + block.column);
      result[0] = sum(sums[0] + sums[1] + (sums[2] + sums[3]));
      result[1] = sum(products[0] + products[1] + (products[2] + products[3]));
    }
  }

  void combine(float* slot, int64_t unit, Range parts) const {
    if (parts.begin == parts.end) return;
    const double rstd = tensors.rstd[unit];
    double weighted_sum = 0, weighted_product = 0;
    for (int64_t c = 0; c < group_size; ++c) {
      double sum = 0, product = 0;
      for (int64_t column = 0; column < columns; ++column) {
        sum += pair(slot, c * columns + column)[0];
        product += pair(slot, c * columns + column)[1];
      }
      weighted_sum += affine.weight[channel(unit, c)] * sum;
      weighted_product += affine.weight[channel(unit, c)] * product;
      affine.dbias[unit * group_size + c] = float(sum);
      affine.dweight[unit * group_size + c] = float(rstd * product);
    }
    const double count = double(group_size * shape.pixels);
    pair(slot, group_size * columns)[0] = -rstd * (rstd * (rstd * weighted_product)) / count;
    pair(slot, group_size * columns)[1] = -rstd * weighted_sum / count;
  }

  [[gnu::flatten]] void apply(float* slot, int64_t unit, int64_t index) const {
    if (!tensors.dx && !tensors.dshortcut) return;
    const Block block = block_at(index);
    const Vec mean = broadcast(tensors.mean[unit]);
    const Vec slope = broadcast(float(pair(slot, group_size * columns)[0]));
    const int64_t bytes = bytes_of<T>(shape);
    const bool streams = past_cache(bytes, static_cast<T*>(tensors.dx), shape.pixels);
    const bool streams_too = past_cache(bytes, static_cast<T*>(tensors.dshortcut), shape.pixels);
    const Vec shift = broadcast(float(pair(slot, group_size * columns)[1]));
    for (int64_t c = block.first; c < block.last; ++c) {
      const Vec scale = broadcast(tensors.rstd[unit] * affine.weight[channel(unit, c)]);
      const Vec bias = broadcast(affine.bias[channel(unit, c)]);
      const int64_t start = offset(unit, c, block.pixel);
      const T* x = static_cast<const T*>(tensors.summed) + start;
      const T* dy = static_cast<const T*>(tensors.dy) + start;
      const T* dsummed = from<T>(tensors.dsummed, start);
      const T* y = from<T>(tensors.y, start);
      T* dx = from<T>(tensors.dx, start);
      T* dshortcut = from<T>(tensors.dshortcut, start);
      for_vectors(block.pixels, [=](int64_t i, auto lanes) {
        const Vec centered = load(x + i, lanes) - mean;
        const Vec z = adds ? load(y + i, lanes) : fma(centered, scale, bias);
        const Vec g = activate_backward<act>(z, load(dy + i, lanes));
        if constexpr (adds) {
          if (dshortcut) store(dshortcut + i, g, lanes, streams_too);
          if (!dx) return;
        }
        Vec grad = fma(scale, g, fma(slope, centered, shift));
        if (dsummed) grad += load(dsummed + i, lanes);
        store(dx + i, grad, lanes, streams);
      });
    }
  }
};

}  // namespace
}  // namespace bitkern::cpu::BITKERN_ISA
