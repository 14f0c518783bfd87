#pragma once

// GCC rounds to _Float16 correctly.
struct __half {
  _Float16 value;

  __half() = default;
  __half(float from) : value(static_cast<_Float16>(from)) {}
  operator float() const { return value; }
};
