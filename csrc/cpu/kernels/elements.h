// The element types of the kernels: plain storage, converted explicitly.
#pragma once
#include <stdint.h>

namespace sail::cpu {
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
}  // namespace sail::cpu
