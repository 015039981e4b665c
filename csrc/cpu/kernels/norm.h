// Kernels of the norms: one row a call. Indexed by DType.
#pragma once
#include "../isa.h"

namespace sail::cpu {
struct RmsNormBackwardRow {
  const void *grad, *x, *weight;  // [D] each
  const void* grad_sum;           // [D], added to dx; null: none
  void* dx;                       // [D]; null: not needed
  float* dweight;                 // [D], added to; null: not needed
  int64_t D;
  float eps;
};

struct NormKernels {
  void (*rms_norm[3])(const void* x, const void* weight, void* y, int64_t D, float eps);
  void (*add_rms_norm[3])(const void* x, const void* residual, const void* weight, void* y, void* sum, int64_t D,
                          float eps);
  void (*rms_norm_backward[3])(const RmsNormBackwardRow& row);
  // out[0..n) = sum over rows of partial [rows, stride], in a fixed order
  void (*sum_rows[3])(const float* partial, int64_t rows, int64_t stride, int64_t n, void* out);
};
#define X(name) SAIL_DECLARE_TABLE(name, NormKernels, kNorm)
SAIL_FOR_EACH_ISA(X)
#undef X

inline const NormKernels& norm_kernels() {
#define X(name) SAIL_TABLE_ADDRESS(name, kNorm)
  static const NormKernels* const tables[] = {SAIL_FOR_EACH_ISA(X)};
#undef X
  return *tables[static_cast<int>(active_isa())];
}
}  // namespace sail::cpu
