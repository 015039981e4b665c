// Kernels of the fused loss, on a block of rows of the transposed logits [V, T]: tokens lie side by side in a vector.
#pragma once
#include "../isa.h"

namespace sail::cpu {
struct LossKernels {
  // max[t], and sum[t] = sum over the rows of exp(logits[v][t] - max[t])
  void (*softmax_statistics[3])(const void* logits, int64_t rows, int64_t T, float* max, float* sum);
  // logits[v][t] becomes factor[t] exp(logits[v][t] - shift[t])
  void (*softmax_gradient[3])(void* logits, int64_t rows, int64_t T, const float* shift, const float* factor);
  void (*store[3])(void* out, int64_t at, float value);  // rounded to the dtype
};
#define X(name) SAIL_DECLARE_TABLE(name, LossKernels, kLoss)
SAIL_FOR_EACH_ISA(X)
#undef X

inline const LossKernels& loss_kernels() {
#define X(name) SAIL_TABLE_ADDRESS(name, kLoss)
  static const LossKernels* const tables[] = {SAIL_FOR_EACH_ISA(X)};
#undef X
  return *tables[static_cast<int>(active_isa())];
}
}  // namespace sail::cpu
