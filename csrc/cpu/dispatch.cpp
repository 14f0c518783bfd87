// Picks the instruction set once, and forwards to the kernels compiled for it.

#include <pthread.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bitkern/cpu.h"
#include "bitkern/operators.h"

namespace bitkern::cpu {

bool forked = false;

namespace {

[[maybe_unused]] const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Kernels {
  const char* isa;
  bool supported;
#define POINTER(name, Problem, Tensors) decltype(&cpu::name) name;
  BITKERN_CPU_OPERATORS(POINTER)
#undef POINTER
};

}  // namespace

// Inside the namespace of an instruction set the names are its kernels'.
#define NAME(name, Problem, Tensors) name,
#define INSTRUCTION_SET(isa)                               \
  namespace isa {                                          \
  BITKERN_CPU_OPERATORS(BITKERN_DECLARE_CPU)               \
  static Kernels kernels(bool supported) {                 \
    return {#isa, supported, BITKERN_CPU_OPERATORS(NAME)}; \
  }                                                        \
  }
INSTRUCTION_SET(baseline)
#if defined(__x86_64__)
INSTRUCTION_SET(avx2)
INSTRUCTION_SET(avx512)
INSTRUCTION_SET(avx512bf16)
#endif
#undef INSTRUCTION_SET
#undef NAME

namespace {

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
      avx512bf16::kernels(avx512 && __builtin_cpu_supports("avx512bf16")),
      avx512::kernels(avx512),
      avx2::kernels(avx2),
#endif
      baseline::kernels(true),
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

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

const char* isa() { return kernels().isa; }

#define FORWARD(name, Problem, Tensors)                                        \
  void name(const Problem& problem, const Tensors& tensors, int num_threads) { \
    kernels().name(problem, tensors, num_threads);                             \
  }
BITKERN_CPU_OPERATORS(FORWARD)
#undef FORWARD

}  // namespace bitkern::cpu
