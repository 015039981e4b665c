// Kernels of the norms: one row a call. Indexed by DType.
#pragma once
#include "../isa.h"

namespace sail::cpu {
struct NormKernels {
  void (*rms_norm[3])(const void* x, const void* weight, void* y, int64_t D, float eps);
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
