// Kernels of the norms: one row a call, a few in the backward. Indexed by DType.
#pragma once
#include "../isa.h"

namespace sail::cpu {
constexpr int kNormGroup = 4;  // rows a call of the backward

struct RmsNormBackwardRows {
  const void *grad[kNormGroup], *x[kNormGroup];  // [D] each
  const void* grad_sum[kNormGroup];              // [D], added to dx; [0] null: none
  void* dx[kNormGroup];                          // [D]; [0] null: not needed
  const void* weight;                            // [D]
  double* dweight;                               // [D], added to; null: not needed
  int64_t D;
  float eps;
  int rows;  // 1 to kNormGroup
};

struct NormKernels {
  void (*rms_norm[3])(const void* x, const void* weight, void* y, int64_t D, float eps);
  void (*add_rms_norm[3])(const void* x, const void* residual, const void* weight, void* y, void* sum, int64_t D,
                          float eps);
  void (*rms_norm_backward[3])(const RmsNormBackwardRows& rows);
  // out[0..n) = sum over rows of partial [rows, stride], in a fixed order
  void (*sum_rows[3])(const double* partial, int64_t rows, int64_t stride, int64_t n, void* out);
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
