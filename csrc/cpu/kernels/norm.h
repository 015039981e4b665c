// Kernels of the norms: one row a call, a few in the backward. Indexed by DType.
#pragma once
#include "../isa.h"

namespace sail::cpu {
constexpr int kNormGroup = 4;  // rows a call of the backward

struct NormRow {
  const void *x, *residual;   // [D]; residual null: none
  const void *weight, *bias;  // [D]; bias null: none
  void *y, *sum;              // [D]; sum = x + residual
  int64_t D;
  float eps;
};

struct NormBackwardRows {
  const void *grad[kNormGroup], *x[kNormGroup];  // [D] each
  const void* grad_sum[kNormGroup];              // [D], added to dx; [0] null: none
  void* dx[kNormGroup];                          // [D]; [0] null: not needed
  const void* weight;                            // [D]
  float *dweight, *dbias;                        // [norm_partial(D)], added to, in the order of lanes; null: not needed
  int64_t D;
  float eps;
  int rows;     // 1 to kNormGroup
  bool stream;  // dx is 64-byte aligned in every row, and too large for the caches
};
// Floats of a partial dweight: D up to a whole pair of vectors of any instruction set.
constexpr int64_t norm_partial(int64_t D) { return (D + 31) / 32 * 32; }

struct NormKernels {
  void (*rms_norm[3])(const NormRow& row);
  void (*layer_norm[3])(const NormRow& row);
  void (*rms_norm_backward[3])(const NormBackwardRows& rows);  // dbias is not touched
  void (*layer_norm_backward[3])(const NormBackwardRows& rows);
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
