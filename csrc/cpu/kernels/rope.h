// Kernels of the rotary embedding, for all heads of one token's q or k. Indexed by DType; the tables are fp32.
#pragma once
#include "../isa.h"

namespace sail::cpu {
// y_low = x_low cos_low - x_high sin_low, y_high = x_high cos_high + x_low sin_high, of the two halves of A elements;
// transposed, which is the gradient: x_low = y_low cos_low + y_high sin_high, x_high = y_high cos_high - y_low sin_low.
struct RopeHeads {
  const void* x;     // head h at x + h * x_step bytes, [A]
  const void* grad;  // backward: of y, head h at grad + h * grad_step
  void* y;           // [heads, A]; backward: dx
  float* dweight;    // [A], added to; null: not needed
  int64_t x_step, grad_step, heads, A;
  const float *cos, *sin, *weight;  // [A]; weight, of the norm before: null: none
  float eps;
};

struct RopeKernels {
  void (*rope[3])(const RopeHeads& heads);
  void (*rope_transposed[3])(const RopeHeads& heads);  // of `grad`
  void (*norm_rope[3])(const RopeHeads& heads);
  void (*norm_rope_backward[3])(const RopeHeads& heads);
  void (*widen[3])(const void* in, int64_t n, float* out);
  void (*narrow[3])(const double* in, int64_t n, void* out);
};
#define X(name) SAIL_DECLARE_TABLE(name, RopeKernels, kRope)
SAIL_FOR_EACH_ISA(X)
#undef X

inline const RopeKernels& rope_kernels() {
#define X(name) SAIL_TABLE_ADDRESS(name, kRope)
  static const RopeKernels* const tables[] = {SAIL_FOR_EACH_ISA(X)};
#undef X
  return *tables[static_cast<int>(active_isa())];
}
}  // namespace sail::cpu
