// What g++ lacks to compile python/bindings.cpp and csrc/cuda: a launch goes to `launcher`, which
// launches.py sets. Kernels are compiled, for their addresses, and never run.

#pragma once

#include <cmath>
#include <stdexcept>

#include "bitkern/cpu.h"
#include "bitkern/operators.h"

#define __global__
#define __device__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __CUDA_BF16_H__  // NVIDIA's headers want more of CUDA than is here
#define __CUDA_FP16_H__

struct __nv_bfloat16 {
  __nv_bfloat16(float = 0) {}
  operator float() const { return 0; }
};

struct __half {
  __half(float = 0) {}
  operator float() const { return 0; }
};

struct dim3 {
  unsigned x;
  dim3(unsigned x = 1) : x(x) {}
};

inline dim3 threadIdx, blockIdx;
inline void __syncthreads() {}
inline float __shfl_xor_sync(unsigned, float value, int) { return value; }

enum cudaError_t : int { cudaSuccess };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

extern "C" {
inline cudaError_t (*launcher)(const void* kernel, unsigned blocks, unsigned threads,
                               const void* const* arguments);
inline char fault[4096];  // of the last launch
}

template <class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments...),
                               const Arguments&... arguments) {
  const void* const addresses[] = {&arguments...};
  const auto address = reinterpret_cast<const void*>(kernel);
  return launcher(address, config->gridDim.x, config->blockDim.x, addresses);
}

inline const char* cudaGetErrorString(cudaError_t) { return fault; }

namespace bitkern::cpu {

inline const char* isa() { return "none"; }

#define ABSENT(name, Problem, Tensors) \
  inline void name(const Problem&, const Tensors&, int) { throw std::logic_error(#name); }
BITKERN_CPU_OPERATORS(ABSENT)

}  // namespace bitkern::cpu
