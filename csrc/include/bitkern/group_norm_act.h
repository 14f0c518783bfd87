#pragma once

#include "bitkern/types.h"

namespace bitkern {

// y = act(weight * (summed - mean) * rstd + bias (+ shortcut)) with summed = x (+ residual),
// statistics per (sample, group).
// Big tensors are dense [batch, channels, pixels], or [batch, pixels, channels] if channels_last.
struct GroupNormActProblem {
  int64_t batch, channels, pixels, groups;
  bool channels_last;
  bool per_sample;                 // weight and bias are [batch, channels], else [channels]
  DType dtype;                     // of the big tensors
  DType weight_dtype, bias_dtype;  // of weight and dweight, bias and dbias
  Activation act;

  BITKERN_FIELDS(batch, channels, pixels, groups, channels_last, per_sample, dtype, weight_dtype,
                 bias_dtype, act)
};

struct GroupNormActForward {
  const void* x;
  const void* residual;  // or null
  const void* weight;    // [(batch,) channels] or null
  const void* bias;      // [(batch,) channels] or null
  const void* shortcut;  // or null; with one, act is relu
  float eps;
  void* summed;          // x + residual; null without residual
  void* y;
  float* mean;           // [batch, groups]
  float* rstd;           // [batch, groups]
  bool normalized;       // mean and rstd are given, x has been summed: only y is computed

  BITKERN_FIELDS(x, residual, weight, bias, shortcut, eps, summed, y, mean, rstd, normalized)
};

struct GroupNormActBackward {
  const void* dy;
  const void* dsummed;  // gradient of summed, or null
  const void* summed;   // x, or x + residual
  const void* y;        // with a shortcut; else null
  const void* weight;   // [(batch,) channels] or null
  const void* bias;     // [(batch,) channels] or null
  const float* mean;    // [batch, groups]
  const float* rstd;    // [batch, groups]
  void* dx;             // gradient of x and of residual alike; null if not wanted
  void* dshortcut;      // null if not wanted
  void* dweight;        // [(batch,) channels], null if not wanted
  void* dbias;          // [(batch,) channels], null if not wanted

  BITKERN_FIELDS(dy, dsummed, summed, y, weight, bias, mean, rstd, dx, dshortcut, dweight, dbias)
};

}  // namespace bitkern
