// Kernels of a few lines for test_emulator.py, right ones and wrong ones.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

static const char* launch(void (*kernel)(const float*, float*), unsigned blocks, unsigned x,
                          unsigned y, const float* in, float* out) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(x, y);
  return cudaGetErrorString(cudaLaunchKernelEx(&config, kernel, in, out));
}

// The body for thread t of its block, i of all. Tests call launch_<name>.
#define KERNEL(name)                                                                           \
  __device__ static void name(const float* in, float* out, int t, int i);                      \
  __global__ static void __launch_bounds__(1024) name##_kernel(const float* in, float* out) {  \
    const int t = threadIdx.x + threadIdx.y * blockDim.x;                                      \
    name(in, out, t, blockIdx.x * blockDim.x * blockDim.y + t);                                \
  }                                                                                            \
  extern "C" __attribute__((visibility("default"))) const char* launch_##name(                 \
      unsigned blocks, unsigned x, unsigned y, const float* in, float* out) {                  \
    return launch(name##_kernel, blocks, x, y, in, out);                                       \
  }                                                                                            \
  __device__ static void name([[maybe_unused]] const float* in, [[maybe_unused]] float* out,   \
                              [[maybe_unused]] int t, [[maybe_unused]] int i)

KERNEL(flip) {
  __shared__ float all[64];
  all[t] = in[i];
  __syncthreads();
  out[i] = all[63 - t];
}

KERNEL(row) {
  __syncthreads();
  out[i] = threadIdx.y;
}

KERNEL(to_half) { out[i] = __half(in[i]); }
KERNEL(to_bfloat16) { out[i] = __nv_bfloat16(in[i]); }

KERNEL(shuffle_xor) { out[i] = __shfl_xor_sync(~0u, in[i], 5); }
KERNEL(shuffle_xor_of_8) { out[i] = __shfl_xor_sync(~0u, in[i], 8, 8); }
KERNEL(shuffle_down) { out[i] = __shfl_down_sync(~0u, in[i], 3); }
KERNEL(shuffle_down_of_4) { out[i] = __shfl_down_sync(~0u, in[i], 1, 4); }
KERNEL(shuffle) { out[i] = __shfl_sync(~0u, in[i], 7); }
KERNEL(shuffle_of_16) { out[i] = __shfl_sync(~0u, in[i], t + 1, 16); }
KERNEL(shuffle_halves) {
  if (t % 32 < 16) {
    out[i] = __shfl_xor_sync(0xffffu, in[i], 1);
  } else {
    out[i] = __shfl_xor_sync(0xffff0000u, in[i], 2);
  }
}

// A barrier is missing between write and read.
#define RACE(name, write, read) \
  KERNEL(name) {                \
    __shared__ float all[64];   \
    all[t] = write;             \
    out[i] = read;              \
  }
RACE(race_with_other_warps, in[i], all[63 - t])
RACE(race_with_first, in[i], all[0])
RACE(race_with_last, in[i], all[63])
RACE(race_in_warp, in[i], all[t ^ 1])

KERNEL(race_after_read) {
  __shared__ float all[64];
  all[t] = in[i];
  __syncthreads();
  out[i] = all[63 - t];
  all[t] = -1;
}

// Waiting in vain.
KERNEL(barrier_without_one) {
  if (t != 40) __syncthreads();
}
KERNEL(two_barriers) {
  if (t < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
KERNEL(warp_without_one) {
  if (t != 3) __shfl_xor_sync(~0u, 1, 1);
}
KERNEL(two_shuffles) {
  if (t % 2) {
    __shfl_xor_sync(~0u, 1, 1);
  } else {
    __shfl_xor_sync(~0u, 1, 1);
  }
}
KERNEL(barrier_and_warp) {
  if (t % 2) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}
KERNEL(lane_outside_mask) {
  if (t < 8) __shfl_sync(0xffu, 1, 8);
}
KERNEL(mask_without_caller) { __syncwarp(2u); }

// For the sanitizers. `element` hides an array's length from all but the address sanitizer.
__device__ static __attribute__((noinline)) float& element(float* array, int i) { return array[i]; }

KERNEL(past_tensor) { out[i + 1] = in[i]; }
KERNEL(past_shared) {
  __shared__ float all[64];
  element(all, t + 1) = in[i];
  out[i] = all[t];
}
KERNEL(past_stack) {
  float own[4] = {};
  __syncthreads();
  element(own, 4) = in[i];
  out[i] = own[t % 4];
}
KERNEL(negative_shift) { out[i] = 1 << (t - 1); }
