// Weight standardization on the GPU: one block per filter, all layers of a call in one launch.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "bitkern/weight_standardize.h"

namespace bitkern::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr size_t PARAMETER_BYTES = 32764;  // of a kernel, from CUDA 12.1 and sm_70 on

// The layers travel as a kernel argument: no table to copy to the device, safe in CUDA graphs.
template <int CAPACITY>
struct Table {
  int count;
  int first_filter[CAPACITY];  // the block that serves the layer's first filter
  WeightStandardizeLayer layers[CAPACITY];
};

template <class T>
__device__ float load(const void* data, int64_t i) {
  return static_cast<float>(static_cast<const T*>(data)[i]);
}

template <class T>
__device__ void store(void* data, int64_t i, float value) {
  static_cast<T*>(data)[i] = static_cast<T>(value);
}

// The sum over the block, in a fixed order, for every thread.
__device__ float block_sum(float value) {
  __shared__ float partial[WARPS];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  __syncthreads();  // the previous sum has been read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
  for (int warp = 0; warp < WARPS; ++warp) sum += partial[warp];
  return sum;
}

// Maps element k of a filter in one layout to its place in the other layout.
struct Transpose {
  int64_t rows, columns;  // of the layout of k; 0 rows: both layouts are the same

  __device__ int64_t operator()(int64_t k) const {
    return rows == 0 ? k : (k % columns) * rows + k / columns;
  }
};

__device__ Transpose weight_to_out(const WeightStandardizeLayer& layer) {
  if (layer.weight_channels_last == layer.out_channels_last) return {0, 0};
  return layer.weight_channels_last ? Transpose{layer.taps, layer.inner}
                                    : Transpose{layer.inner, layer.taps};
}

template <int CAPACITY>
__device__ const WeightStandardizeLayer& layer_of(const Table<CAPACITY>& table, int block) {
  int low = 0, high = table.count;  // first_filter[low] <= block < first_filter[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first_filter[middle] <= block ? low : high) = middle;
  }
  return table.layers[low];
}

template <int CAPACITY>
__device__ int filter_of(const Table<CAPACITY>& table, const WeightStandardizeLayer& layer,
                         int block) {
  return block - table.first_filter[&layer - table.layers];
}

template <class W, class O, int CAPACITY>
__global__ void __launch_bounds__(THREADS)
    weight_standardize_forward(const WeightStandardizeProblem problem,
                               const __grid_constant__ Table<CAPACITY> table) {
  const WeightStandardizeLayer& layer = layer_of(table, blockIdx.x);
  const int filter = filter_of(table, layer, blockIdx.x);
  const int64_t size = layer.inner * layer.taps, base = filter * size;

  // Distances from the first element are small where the mean is large, and 0 if all are equal.
  const float origin = size > 0 ? load<W>(layer.weight, base) : 0.0f;
  float sum = 0;
  for (int64_t k = threadIdx.x; k < size; k += THREADS) {
    sum += load<W>(layer.weight, base + k) - origin;
  }
  const float mean = origin + block_sum(sum) / size;
  float distances = 0, squares = 0;
  for (int64_t k = threadIdx.x; k < size; k += THREADS) {
    const float distance = load<W>(layer.weight, base + k) - mean;
    distances += distance;
    squares += distance * distance;
  }
  // The rounding error of the mean may be large against the standard deviation.
  distances = block_sum(distances);
  const float rest = distances / size;
  const float var = (block_sum(squares) - rest * distances) / (size - problem.unbiased);
  const float std = sqrtf(problem.eps_outside ? var : var + problem.eps);
  if (threadIdx.x == 0) {
    layer.mean[filter] = mean;
    layer.std[filter] = std;
  }

  const float gain = layer.gain ? load<W>(layer.gain, filter) : 1.0f;
  const float factor = gain * layer.scale / (problem.eps_outside ? std + problem.eps : std);
  const Transpose to_out = weight_to_out(layer);
  for (int64_t k = threadIdx.x; k < size; k += THREADS) {
    const float c = load<W>(layer.weight, base + k) - mean - rest;
    store<O>(layer.out, base + to_out(k), c * factor);
  }
}

template <class W, class O, int CAPACITY>
__global__ void __launch_bounds__(THREADS)
    weight_standardize_backward(const WeightStandardizeProblem problem,
                                const __grid_constant__ Table<CAPACITY> table) {
  const WeightStandardizeLayer& layer = layer_of(table, blockIdx.x);
  const int filter = filter_of(table, layer, blockIdx.x);
  const int64_t size = layer.inner * layer.taps, base = filter * size;
  const float mean = layer.mean[filter], std = layer.std[filter];
  const float denominator = problem.eps_outside ? std + problem.eps : std;
  const Transpose to_out = weight_to_out(layer);

  float sum = 0, distances = 0, dot = 0;  // of dout, of w - mean, and of their products
  for (int64_t k = threadIdx.x; k < size; k += THREADS) {
    const float dout = load<O>(layer.dout, base + to_out(k));
    const float distance = load<W>(layer.weight, base + k) - mean;
    sum += dout;
    distances += distance;
    dot += dout * distance;
  }
  sum = block_sum(sum);
  const float rest = block_sum(distances) / size;  // what the mean lost by rounding
  dot = block_sum(dot) - rest * sum;
  if (threadIdx.x == 0 && layer.dgain) {
    store<W>(layer.dgain, filter, layer.scale * dot / denominator);
  }

  const float gain = layer.gain ? load<W>(layer.gain, filter) : 1.0f;
  const float factor = gain * layer.scale / denominator;
  // A constant filter has no direction to project out.
  const float along =
      std == 0 ? 0.0f : dot / (denominator * std * float(size - problem.unbiased));
  for (int64_t k = threadIdx.x; k < size; k += THREADS) {
    const float dout = load<O>(layer.dout, base + to_out(k));
    const float c = load<W>(layer.weight, base + k) - mean - rest;
    store<W>(layer.dweight, base + k, factor * (dout - sum / size - c * along));
  }
}

}  // namespace

#ifndef __CUDACC_RTC__  // NVRTC, which compiles kernels alone

namespace {

template <class W, class O, int CAPACITY>
void launch_table(bool forward, const WeightStandardizeProblem& problem,
                  const WeightStandardizeLayer* layers, int64_t count, cudaStream_t stream) {
  static_assert(sizeof(WeightStandardizeProblem) + sizeof(Table<CAPACITY>) <= PARAMETER_BYTES);
  Table<CAPACITY> table;
  int64_t filters = 0;
  table.count = static_cast<int>(count);
  for (int64_t i = 0; i < count; ++i) {
    table.first_filter[i] = static_cast<int>(filters);
    table.layers[i] = layers[i];
    filters += layers[i].filters;
  }
  if (filters == 0) return;
  const auto kernel = forward ? weight_standardize_forward<W, O, CAPACITY>
                              : weight_standardize_backward<W, O, CAPACITY>;
  // Not <<<...>>>, which C++ cannot parse: tests/backends/cuda has this part compiled by g++.
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(filters));
  config.blockDim = dim3(THREADS);
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, problem, table);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("weight_standardize: ") + cudaGetErrorString(error));
  }
}

template <class W, class O>
void launch(bool forward, const WeightStandardizeProblem& problem,
            const WeightStandardizeLayers& layers, cudaStream_t stream) {
  constexpr int64_t MANY = 256;
  const auto [first, count] = layers;
  if (count == 1) return launch_table<W, O, 1>(forward, problem, first, 1, stream);
  for (int64_t i = 0; i < count; i += MANY) {
    launch_table<W, O, MANY>(forward, problem, first + i, std::min(count - i, MANY), stream);
  }
}

void launch_any(bool forward, const WeightStandardizeProblem& problem,
                const WeightStandardizeLayers& layers, void* stream_address) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  const auto with_out = [&](auto weight) {
    using W = decltype(weight);
    switch (problem.out_dtype) {
      case DType::float32: return launch<W, float>(forward, problem, layers, stream);
      case DType::bfloat16: return launch<W, __nv_bfloat16>(forward, problem, layers, stream);
      case DType::float16: return launch<W, __half>(forward, problem, layers, stream);
    }
  };
  switch (problem.weight_dtype) {
    case DType::float32: return with_out(float());
    case DType::bfloat16: return with_out(__nv_bfloat16());
    case DType::float16: return with_out(__half());
  }
}

}  // namespace

void weight_standardize_forward(const WeightStandardizeProblem& problem,
                                const WeightStandardizeLayers& layers, void* stream) {
  launch_any(true, problem, layers, stream);
}

void weight_standardize_backward(const WeightStandardizeProblem& problem,
                                 const WeightStandardizeLayers& layers, void* stream) {
  launch_any(false, problem, layers, stream);
}

#endif

}  // namespace bitkern::cuda
