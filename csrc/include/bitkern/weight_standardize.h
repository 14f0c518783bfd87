#pragma once

#include "bitkern/types.h"

namespace bitkern {

// out = gain * scale * (w - mean) / denominator per filter, where the denominator is
// sqrt(var + eps), or sqrt(var) + eps if eps_outside; var divides by K - 1 if unbiased.
struct WeightStandardizeProblem {
  float eps;
  bool eps_outside, unbiased;
  DType weight_dtype;  // of weight, gain and their gradients
  DType out_dtype;     // of out and dout

  BITKERN_FIELDS(eps, eps_outside, unbiased, weight_dtype, out_dtype)
};

// One layer. A filter has K = inner * taps elements, stored [inner, taps], or [taps, inner] where
// the tensor is channels_last.
struct WeightStandardizeLayer {
  int64_t filters, inner, taps;
  float scale;
  bool weight_channels_last;  // of weight and dweight
  bool out_channels_last;     // of out and dout
  const void* weight;         // [filters, K]
  const void* gain;           // [filters] or null
  float* mean;                // [filters]
  float* std;                 // [filters]: sqrt(var + eps), or sqrt(var) if eps_outside
  void* out;                  // [filters, K], forward only
  const void* dout;           // [filters, K], backward only
  void* dweight;              // [filters, K], backward only
  void* dgain;                // [filters] or null, backward only

  BITKERN_FIELDS(filters, inner, taps, scale, weight_channels_last, out_channels_last, weight, gain,
                 mean, std, out, dout, dweight, dgain)
};

using WeightStandardizeLayers = Span<WeightStandardizeLayer>;

// Backward and, with its gradient that is never stored, a step of SGD with momentum.
struct WeightStandardizeSgdProblem {
  float eps;
  bool eps_outside, unbiased;
  const float* lr;  // one number
  float momentum, dampening, weight_decay;
  bool nesterov;

  BITKERN_FIELDS(eps, eps_outside, unbiased, lr, momentum, dampening, weight_decay, nesterov)
};

struct WeightStandardizeSgdLayer {
  int64_t filters, inner, taps;
  float scale;
  bool weight_channels_last;  // of weight and buffer
  bool out_channels_last;     // of dout
  const float* mean;          // [filters]
  const float* std;           // [filters], as in WeightStandardizeLayer
  const float* dout;          // [filters, K]
  float* weight;              // [filters, K]
  float* buffer;              // [filters, K], of the momentum

  BITKERN_FIELDS(filters, inner, taps, scale, weight_channels_last, out_channels_last, mean, std,
                 dout, weight, buffer)
};

using WeightStandardizeSgdLayers = Span<WeightStandardizeSgdLayer>;

}  // namespace bitkern
