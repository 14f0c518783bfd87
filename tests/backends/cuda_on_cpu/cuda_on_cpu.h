// CUDA C++ on a CPU: g++ -x c++ -include cuda_on_cpu.h kernels.cu. For tests, not for speed.
//
// Blocks run one after another, the threads of a block as fibers of one OS thread. A thread runs
// until it waits for others, and its warp as far as it can before the next warp runs; every other
// time the order is reversed. So what a missing barrier lets happen on a GPU happens here, each
// time. Threads that wait for what cannot come are an error of the launch, which names the lines.
//
// Not there: dynamic shared memory, atomics, textures. Shared memory holds NaN bytes when a block
// starts, except in templates, where GCC 12 ignores its section.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "fiber.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared")))  // one block runs at a time

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace cuda_on_cpu {

constexpr unsigned WARP = 32;

struct Thread {
  Fiber fiber;
  uint3 index;
  enum { ready, waits, returned } state;
  unsigned lanes;   // that it waits for; 0: for the block
  int line;         // where it waits
  uint64_t value;   // what it offers to its warp, then what it got
  unsigned source;  // the lane to get it from
};

inline std::vector<Thread> threads;  // of the block
inline Thread* current;
inline std::string error;

inline unsigned lane() { return unsigned(current - threads.data()) % WARP; }

inline void wait(unsigned lanes, int line) {
  current->state = Thread::waits;
  current->lanes = lanes;
  current->line = line;
  current->fiber.stop();
}

template <class T>
T shuffle(unsigned lanes, T value, unsigned source, int line) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  Thread& me = *current;
  std::memcpy(&me.value, &value, sizeof(T));
  me.source = source;
  wait(lanes, line);
  std::memcpy(&value, &me.value, sizeof(T));
  return value;
}

// Whether the lanes that `thread` waits for are all where it is, and get from one another.
inline bool complete(const Thread& thread, const Thread* warp, unsigned lanes) {
  for (unsigned i = 0; i < WARP; ++i) {
    if (!(lanes >> i & 1)) continue;
    if (warp[i].state != Thread::waits || warp[i].lanes != thread.lanes ||
        warp[i].line != thread.line || !(lanes >> warp[i].source & 1)) {
      return false;
    }
  }
  return true;
}

// Hands values round in a warp where all have come that are waited for; whether anybody can go on.
inline bool exchange(Thread* warp, unsigned count) {
  const uint32_t existing = (uint64_t(1) << count) - 1;
  bool any = false;
  for (unsigned lane = 0; lane < count; ++lane) {
    const uint32_t lanes = warp[lane].lanes & existing;
    if (!(lanes >> lane & 1) || !complete(warp[lane], warp, lanes)) continue;
    uint64_t offered[WARP];
    for (unsigned i = 0; i < count; ++i) offered[i] = warp[i].value;
    for (unsigned i = 0; i < count; ++i) {
      if (!(lanes >> i & 1)) continue;
      warp[i].value = offered[warp[i].source];
      warp[i].state = Thread::ready;
    }
    any = true;
  }
  return any;
}

// Runs a warp until none of its threads can go on without other warps.
inline void run_warp(Thread* warp, unsigned count, bool reversed) {
  do {
    for (unsigned i = 0; i < count; ++i) {
      current = warp + (reversed ? count - 1 - i : i);
      threadIdx = current->index;
      if (current->state == Thread::ready) current->fiber.resume();
    }
  } while (exchange(warp, count));
}

inline std::string described(const Thread& thread) {
  const std::string name = "thread " + std::to_string(&thread - threads.data());
  if (thread.state == Thread::returned) return name + " has returned";
  return name + " waits for its " + (thread.lanes ? "warp" : "block") + " at line " +
         std::to_string(thread.line);
}

// Where every thread has returned or waits: whether all wait for the block, at one barrier.
inline bool at_barrier() {
  const Thread& first = threads[0];
  for (const Thread& t : threads) {
    if (t.state == Thread::waits && !t.lanes && !first.lanes && t.line == first.line) continue;
    error = described(first) + (&t == &first ? "" : ", " + described(t));
    return false;
  }
  return true;
}

// Where the linker put this module's shared memory, if there is any.
extern "C" __attribute__((weak, visibility("hidden"))) char __start_cuda_shared[];
extern "C" __attribute__((weak, visibility("hidden"))) char __stop_cuda_shared[];

// The sanitizer is not to see this: the bytes between two variables are forbidden to others.
__attribute__((no_sanitize("address"), noinline)) inline void poison_shared() {
  for (volatile char* byte = __start_cuda_shared; byte != __stop_cuda_shared; ++byte) *byte = -1;
}

// Whether all threads of the block returned.
template <class Body>
bool run_block(const Body& body, bool reversed) {
  poison_shared();
  for (unsigned i = 0; i < threads.size(); ++i) {
    Thread& t = threads[i];
    t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    t.state = Thread::ready;
    t.fiber.start([&body, &t] {
      body();
      t.state = Thread::returned;
    });
  }
  const unsigned size = threads.size(), warps = (size + WARP - 1) / WARP;
  for (;; reversed = !reversed) {
    for (unsigned w = 0; w < warps; ++w) {
      const unsigned first = WARP * (reversed ? warps - 1 - w : w);
      run_warp(&threads[first], std::min(WARP, size - first), reversed);
    }
    const auto returned = [](const Thread& t) { return t.state == Thread::returned; };
    if (std::all_of(threads.begin(), threads.end(), returned)) return true;
    if (!at_barrier()) return false;
    for (Thread& t : threads) t.state = Thread::ready;
  }
}

}  // namespace cuda_on_cpu

// The line is that of the caller.
inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::wait(0, line); }

inline void __syncwarp(unsigned lanes = ~0u, int line = __builtin_LINE()) {
  cuda_on_cpu::shuffle(lanes, 0, cuda_on_cpu::lane(), line);
}

template <class T>
T __shfl_sync(unsigned lanes, T value, int from, int width = 32, int line = __builtin_LINE()) {
  const unsigned first = cuda_on_cpu::lane() & -width;
  return cuda_on_cpu::shuffle(lanes, value, first + (from & (width - 1)), line);
}

template <class T>
T __shfl_down_sync(unsigned lanes, T value, unsigned by, int width = 32,
                   int line = __builtin_LINE()) {
  const unsigned me = cuda_on_cpu::lane(), end = (me & -width) + width;
  return cuda_on_cpu::shuffle(lanes, value, me + by < end ? me + by : me, line);
}

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int mask, int width = 32, int line = __builtin_LINE()) {
  const unsigned me = cuda_on_cpu::lane(), end = (me & -width) + width;
  return cuda_on_cpu::shuffle(lanes, value, (me ^ mask) < end ? me ^ mask : me, line);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_on_cpu;
  const dim3 grid = gridDim = config->gridDim, block = blockDim = config->blockDim;
  const uint64_t size = uint64_t(block.x) * block.y * block.z;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (size < 1 || size > 1024 || blocks < 1 || config->dynamicSmemBytes) {
    error = "cannot run " + std::to_string(blocks) + " blocks of " + std::to_string(size) +
            " threads and " + std::to_string(config->dynamicSmemBytes) + " bytes";
    return cudaErrorInvalidConfiguration;
  }
  threads = std::vector<Thread>(size);  // with new stacks: threads may have been left on the old
  for (uint64_t i = 0; i < blocks; ++i) {
    blockIdx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    if (run_block([&] { kernel(arguments...); }, i % 2)) continue;
    error = "block " + std::to_string(i) + ": " + error;
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaSuccess ? "no error" : cuda_on_cpu::error.c_str();
}
