#pragma once

// What the two memory layouts of GroupNorm + activation share: the activations, and the schedule of
// a reduction followed by an elementwise pass.

#include "bitkern/group_norm_act.h"
#include "parallel.h"
#include "vec.h"

namespace bitkern::cpu::BITKERN_ISA {
namespace {

// Comparisons are written so that NaN passes.

constexpr float LEAK = 0.01f;

// e^(-z²/2)
inline Vec bell(Vec z) { return exp_down(z * z * -0.5f); }

// The integral of the standard normal density up to z, by that up to -a: bell(a) (1/2 - a t p(t))
// with a = |z|, t = 1 / (1 + 0.26 a); p is the fit of degree 8 on a <= 14.7, within 6.2e-9.
inline Vec normal_cdf(Vec z, Vec bell) {
  const Vec a = z < 0.0f ? -z : z, t = 1.0f / fma(a, broadcast(0.26f), broadcast(1.0f));
  Vec p = fma(t, broadcast(0x1.1f9826p-7f), broadcast(-0x1.21722ep-5f));
  p = fma(t, p, broadcast(0x1.463eeep-5f));
  p = fma(t, p, broadcast(-0x1.817b52p-7f));
  p = fma(t, p, broadcast(0x1.45e5d2p-5f));
  p = fma(t, p, broadcast(0x1.8a5b96p-5f));
  p = fma(t, p, broadcast(0x1.39736cp-4f));
  p = fma(t, p, broadcast(0x1.a5d692p-4f));
  p = fma(t, p, broadcast(0x1.0a3e6p-3f));
  const Vec tail = bell * fma(-a * t, p, broadcast(0.5f));
  return z < 0.0f ? tail : 1.0f - tail;
}

// Beyond it tanh(softplus(z)) is 1 in float, and its powers do not overflow before.
constexpr float MISH_END = 20.0f;

template <Activation act>
inline Vec activate(Vec z) {
  if constexpr (act == Activation::relu) return relu(z);
  if constexpr (act == Activation::silu) return z / (1.0f + exp(-z));
  if constexpr (act == Activation::leaky_relu) return z > 0.0f ? z : LEAK * z;
  if constexpr (act == Activation::gelu) return z * normal_cdf(z, bell(z));
  if constexpr (act == Activation::mish) {  // tanh(softplus(z)) = n / (n + 2)
    const Vec e = exp_down(z > MISH_END ? broadcast(MISH_END) : z), n = e * (e + 2.0f);
    return z * (n / (n + 2.0f));
  }
  if constexpr (act == Activation::hardswish) {
    const Vec gate = relu(z + 3.0f);
    return z * ((gate > 6.0f ? broadcast(6.0f) : gate) * (1.0f / 6.0f));
  }
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
  if constexpr (act == Activation::leaky_relu) return z > 0.0f ? dy : LEAK * dy;
  if constexpr (act == Activation::gelu) {
    const Vec e = bell(z);
    return dy * fma(z, e * 0x1.988454p-2f, normal_cdf(z, e));  // e / sqrt(2 pi), the density
  }
  if constexpr (act == Activation::mish) {
    z = z > MISH_END ? broadcast(MISH_END) : z;
    const Vec e = exp_down(z), n = e * (e + 2.0f), r = 1.0f / (n + 2.0f);
    return dy * (r * fma(4.0f * z, e * (e + 1.0f) * r, n));
  }
  if constexpr (act == Activation::hardswish) {
    const Vec g = dy * fma(z, broadcast(1.0f / 3.0f), broadcast(0.5f));
    return z <= -3.0f ? Vec{} : z >= 3.0f ? dy : g;
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
  const float* weight;  // [samples, channels]
  const float* bias;    // [samples, channels]
  float* dweight;       // [batch, channels]
  float* dbias;         // [batch, channels]
  int64_t samples;      // batch, or 1 for parameters that all samples share
};

}  // namespace
}  // namespace bitkern::cpu::BITKERN_ISA
