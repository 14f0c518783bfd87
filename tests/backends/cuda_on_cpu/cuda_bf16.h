#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  __nv_bfloat16(float from) {
    uint32_t wide;
    std::memcpy(&wide, &from, sizeof wide);
    wide += 0x7fff + (wide >> 16 & 1);  // to nearest, ties to even
    bits = from == from ? wide >> 16 : 0x7fff;
  }
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float to;
    std::memcpy(&to, &wide, sizeof to);
    return to;
  }
};
