#pragma once

namespace bitkern::cpu {

// The instruction set the kernels run with: "baseline", "avx2" or "avx512".
const char* isa();

}  // namespace bitkern::cpu
