// What python/bindings.cpp wants besides the CUDA kernels, in a module that has these alone.

#include <stdexcept>

#include "bitkern/cpu.h"
#include "bitkern/operators.h"

namespace bitkern::cpu {

const char* isa() { return "none"; }

#define ABSENT(name, Problem, Tensors) \
  void name(const Problem&, const Tensors&, int) { throw std::logic_error(#name " is not here"); }
BITKERN_CPU_OPERATORS(ABSENT)

}  // namespace bitkern::cpu
