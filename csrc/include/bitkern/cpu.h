#pragma once

namespace bitkern::cpu {

// The instruction set the kernels run with: "baseline", "avx2", "avx512" or "avx512bf16".
const char* isa();

}  // namespace bitkern::cpu
