#pragma once

// What the two memory layouts of GroupNorm + activation share: the activations, and the schedule of
// a reduction followed by an elementwise pass.

#include "bitkern/group_norm_act.h"
#include "parallel.h"
#include "vec.h"

namespace bitkern::cpu::BITKERN_ISA {
namespace {

// Comparisons are written so that NaN passes.

template <Activation act>
inline Vec activate(Vec z) {
  if constexpr (act == Activation::relu) return relu(z);
  if constexpr (act == Activation::silu) return z / (1.0f + exp(-z));
  return z;
}

// dy * act'(z)
template <Activation act>
inline Vec activate_backward(Vec z, Vec dy) {
  if constexpr (act == Activation::relu) return z <= 0.0f ? Vec{} : dy;
  if constexpr (act == Activation::silu) {
    const Vec sigmoid = 1.0f / (1.0f + exp(-z));
    return dy * (sigmoid * fma(z, 1.0f - sigmoid, broadcast(1.0f)));
  }
  return dy;
}

// The size of a block of elements, the unit of work below a sample or a group. It must not depend
// on the batch or on the number of threads, for partial sums are taken per block.
constexpr int64_t BLOCK = 1 << 14;

// The size of a slot in whole cache lines, so that no two threads write to the same one.
constexpr int64_t whole_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

// A kernel reduces each of its `units` (samples or groups), then applies the result elementwise:
//   prepare(slot, unit, parts), reduce(slot, unit, block), combine(slot, unit, parts),
//   apply(slot, unit, block)
// in this order, where `slot` is scratch memory of one unit, of slot_size floats.
// A thread keeps a unit to itself, so that the second pass finds it in cache; the units that do not
// divide over the threads are shared by all of them, block by block. `slots` holds 2 * size slots.
template <class Kernel>
void two_pass(const Team& team, const Kernel& kernel, float* slots) {
  const int64_t rest = kernel.units % team.size, whole = kernel.units - rest;
  const Range mine = team.share(whole);
  float* const own = slots + team.rank * kernel.slot_size;
  for (int64_t unit = mine.begin; unit < mine.end; ++unit) {
    kernel.prepare(own, unit, {0, kernel.parts});
    for (int64_t block = 0; block < kernel.blocks; ++block) kernel.reduce(own, unit, block);
    kernel.combine(own, unit, {0, kernel.parts});
    // Backwards, for the last blocks are the ones still in cache.
    for (int64_t block = kernel.blocks - 1; block >= 0; --block) kernel.apply(own, unit, block);
  }
  if (rest == 0) return;
  float* const shared = slots + team.size * kernel.slot_size;
  const Range parts = team.share(kernel.parts), blocks = team.share(rest * kernel.blocks);
  for (int64_t i = 0; i < rest; ++i) {
    kernel.prepare(shared + i * kernel.slot_size, whole + i, parts);
  }
  team.barrier();
  for (int64_t i = blocks.begin; i < blocks.end; ++i) {
    const int64_t unit = i / kernel.blocks;
    kernel.reduce(shared + unit * kernel.slot_size, whole + unit, i % kernel.blocks);
  }
  team.barrier();
  for (int64_t i = 0; i < rest; ++i) {
    kernel.combine(shared + i * kernel.slot_size, whole + i, parts);
  }
  team.barrier();
  for (int64_t i = blocks.end - 1; i >= blocks.begin; --i) {
    const int64_t unit = i / kernel.blocks;
    kernel.apply(shared + unit * kernel.slot_size, whole + unit, i % kernel.blocks);
  }
}

template <class T>
int64_t bytes_of(const GroupNormActProblem& shape) {
  return shape.batch * shape.channels * shape.pixels * int64_t(sizeof(T));
}

// A tensor from element `start` on; null stays null.
template <class T>
const T* from(const void* tensor, int64_t start) {
  return tensor ? static_cast<const T*>(tensor) + start : nullptr;
}
template <class T>
T* from(void* tensor, int64_t start) {
  return tensor ? static_cast<T*>(tensor) + start : nullptr;
}

// The affine parameters and, for the backward, where the per-sample gradients of them go.
struct Affine {
  const float* weight;  // [channels]
  const float* bias;    // [channels]
  float* dweight;       // [batch, channels]
  float* dbias;         // [batch, channels]
};

}  // namespace
}  // namespace bitkern::cpu::BITKERN_ISA
