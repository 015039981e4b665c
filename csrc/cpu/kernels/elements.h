// The element types of the kernels: plain storage, converted explicitly.
#pragma once
#include <stdint.h>
#include <string.h>

namespace sail::cpu {
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// static: the linker must not share one instruction set's copy with another's
static inline float bf16_to_float(uint16_t bits) {
  const uint32_t u = static_cast<uint32_t>(bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline float f16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  uint32_t u = magnitude >= 0x7c00 ? sign | 0x7f800000 | (magnitude & 0x3ff) << 13 : magnitude << 13;
  float f;
  memcpy(&f, &u, 4);
  if (magnitude >= 0x7c00) return f;  // inf, nan
  f *= 0x1p112f;                      // subnormals included
  return sign ? -f : f;
}
}  // namespace sail::cpu
