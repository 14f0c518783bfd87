// The operators: X(name, problem, tensors). An operator has one line here, its structs in
// a header, and its kernel in csrc/cpu or csrc/cuda; dispatch and bindings follow from the lists.

#pragma once

#include "bitkern/group_norm_act.h"
#include "bitkern/weight_standardize.h"

#define BITKERN_CPU_OPERATORS(X)                                                     \
  X(group_norm_act_forward, GroupNormActProblem, GroupNormActForward)                \
  X(group_norm_act_backward, GroupNormActProblem, GroupNormActBackward)              \
  X(weight_standardize_forward, WeightStandardizeProblem, WeightStandardizeLayers)   \
  X(weight_standardize_backward, WeightStandardizeProblem, WeightStandardizeLayers)  \
  X(weight_standardize_sgd, WeightStandardizeSgdProblem, WeightStandardizeSgdLayers)

#define BITKERN_CUDA_OPERATORS(X)                                                    \
  X(weight_standardize_forward, WeightStandardizeProblem, WeightStandardizeLayers)   \
  X(weight_standardize_backward, WeightStandardizeProblem, WeightStandardizeLayers)

#define BITKERN_DECLARE_CPU(name, Problem, Tensors) \
  void name(const Problem&, const Tensors&, int num_threads);
#define BITKERN_DECLARE_CUDA(name, Problem, Tensors) \
  void name(const Problem&, const Tensors&, void* stream);

namespace bitkern::cpu {
BITKERN_CPU_OPERATORS(BITKERN_DECLARE_CPU)
}

namespace bitkern::cuda {  // on the current device; `stream` is a cudaStream_t
BITKERN_CUDA_OPERATORS(BITKERN_DECLARE_CUDA)
}
