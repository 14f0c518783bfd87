// Picks the instruction set once, and forwards to the kernels compiled for it.

#include <pthread.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bitkern/cpu.h"
#include "bitkern/group_norm_act.h"
#include "bitkern/weight_standardize.h"

namespace bitkern::cpu {

#define DECLARE(ISA)                                                                           \
  namespace ISA {                                                                              \
  void group_norm_act_forward(const GroupNormAct&, const GroupNormActForward&, int);           \
  void group_norm_act_backward(const GroupNormAct&, const GroupNormActBackward&, int);         \
  void weight_standardize_forward(                                                             \
      const WeightStandardize&, const WeightStandardizeLayer*, int64_t, int);                  \
  void weight_standardize_backward(                                                            \
      const WeightStandardize&, const WeightStandardizeLayer*, int64_t, int);                  \
  }
DECLARE(baseline)
#if defined(__x86_64__)
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512bf16)
#endif
#undef DECLARE

bool forked = false;

namespace {

[[maybe_unused]] const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Kernels {
  const char* isa;
  bool supported;
  decltype(&cpu::group_norm_act_forward) group_norm_act_forward;
  decltype(&cpu::group_norm_act_backward) group_norm_act_backward;
  decltype(&cpu::weight_standardize_forward) weight_standardize_forward;
  decltype(&cpu::weight_standardize_backward) weight_standardize_backward;
};

#define KERNELS(ISA, SUPPORTED)                                               \
  {#ISA, SUPPORTED, ISA::group_norm_act_forward, ISA::group_norm_act_backward, \
   ISA::weight_standardize_forward, ISA::weight_standardize_backward}

// The best instruction set of this machine, or the one BITKERN_CPU_ISA names.
Kernels choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
#endif
  const Kernels all[] = {
#if defined(__x86_64__)
      KERNELS(avx512bf16, avx512 && __builtin_cpu_supports("avx512bf16")),
      KERNELS(avx512, avx512),
      KERNELS(avx2, avx2),
#endif
      KERNELS(baseline, true),
  };
  const char* wanted = std::getenv("BITKERN_CPU_ISA");
  std::string supported;
  for (const Kernels& kernels : all) {
    if (!kernels.supported) continue;
    if (!wanted || std::strcmp(wanted, kernels.isa) == 0) return kernels;
    supported += supported.empty() ? kernels.isa : std::string(", ") + kernels.isa;
  }
  throw std::invalid_argument("BITKERN_CPU_ISA: expected one of this machine's " + supported +
                              ", got '" + wanted + "'");
}
#undef KERNELS

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

const char* isa() { return kernels().isa; }

void group_norm_act_forward(const GroupNormAct& shape, const GroupNormActForward& tensors,
                            int num_threads) {
  kernels().group_norm_act_forward(shape, tensors, num_threads);
}

void group_norm_act_backward(const GroupNormAct& shape, const GroupNormActBackward& tensors,
                             int num_threads) {
  kernels().group_norm_act_backward(shape, tensors, num_threads);
}

void weight_standardize_forward(const WeightStandardize& variant,
                                const WeightStandardizeLayer* layers, int64_t count,
                                int num_threads) {
  kernels().weight_standardize_forward(variant, layers, count, num_threads);
}

void weight_standardize_backward(const WeightStandardize& variant,
                                 const WeightStandardizeLayer* layers, int64_t count,
                                 int num_threads) {
  kernels().weight_standardize_backward(variant, layers, count, num_threads);
}

}  // namespace bitkern::cpu
