#pragma once

#include "bitkern/types.h"

namespace bitkern {

// out = gain * scale * (w - mean) / denominator per filter, where the denominator is
// sqrt(var + eps), or sqrt(var) + eps if eps_outside; var divides by K - 1 if unbiased.
struct WeightStandardize {
  float eps;
  bool eps_outside, unbiased;
  DType weight_dtype;  // of weight, gain and their gradients
  DType out_dtype;     // of out and dout
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
};

namespace cpu {
void weight_standardize_forward(
    const WeightStandardize&, const WeightStandardizeLayer* layers, int64_t count, int num_threads);
void weight_standardize_backward(
    const WeightStandardize&, const WeightStandardizeLayer* layers, int64_t count, int num_threads);
}  // namespace cpu

namespace cuda {  // on the current device; `stream` is a cudaStream_t
void weight_standardize_forward(
    const WeightStandardize&, const WeightStandardizeLayer* layers, int64_t count, void* stream);
void weight_standardize_backward(
    const WeightStandardize&, const WeightStandardizeLayer* layers, int64_t count, void* stream);
}  // namespace cuda

}  // namespace bitkern
