#pragma once

#include <cstdint>

namespace bitkern {

enum class DType : int { float32, bfloat16, float16 };

enum class Activation : int { none, relu, silu, leaky_relu, gelu, mish, hardswish };

// A view of an array. Not a std::vector: the kernels are compiled once per instruction set, and of
// an inline function in several of them the linker would keep an arbitrary one.
template <class T>
struct Span {
  const T* data;
  int64_t size;
};

}  // namespace bitkern

// Inside a struct, lists its fields for whoever fills them in by name: visit(body) calls
// body("first, second, ...", first, second, ...).
#define BITKERN_FIELDS(...)          \
  template <class Body>              \
  void visit(Body&& body) {          \
    body(#__VA_ARGS__, __VA_ARGS__); \
  }
