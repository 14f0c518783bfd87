#pragma once

#include <cstdint>

namespace bitkern {

enum class DType : int { float32, bfloat16, float16 };

enum class Activation : int { none, relu, silu };

}  // namespace bitkern
