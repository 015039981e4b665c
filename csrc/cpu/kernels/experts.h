// The element-wise parts of an expert layer, on blocks of rows; tables indexed by DType. T is the operands' dtype.
#pragma once
#include "../isa.h"
#include "gemm.h"

namespace sail::cpu {
enum class Activation { silu = 0, gelu = 1, gelu_tanh = 2 };

// a = act(gate + bias) * (up + bias); keeps the pre-activation in T where h_gate is given.
struct GatedForward {
  const float *gate, *up;  // [M, n], rows ld apart
  int64_t ld, M, n;
  const void *gate_bias, *up_bias;  // [n] or null
  Activation activation;
  float clamp;          // infinity: none
  void *h_gate, *h_up;  // [M, n] or null, rows ldh apart
  int64_t ldh;
  void* a;  // [M, n] or null, rows lda apart
  int64_t lda;
};

// From da = gradient of a before weighting and the saved pre-activation h:
// dot += <da, a>; dh = weight * da * d(act(gate) * up); a_weighted = weight * a.
struct GatedBackward {
  const float* da;  // [M, n], rows ld apart
  int64_t ld, M, n;
  const void *h_gate, *h_up;  // [M, n], rows ldh apart
  int64_t ldh;
  Activation activation;
  float clamp;
  const float* weight;    // [M]
  void *dh_gate, *dh_up;  // [M, n], rows lddh apart
  int64_t lddh;
  void* a_weighted;  // [M, n], rows lda apart
  int64_t lda;
  float* dot;  // [M]
};

// out[m] = (c[m] + bias) * weight[m]
struct StoreRows {
  const float* c;  // [M, n], rows ldc apart
  int64_t ldc, M, n;
  const void* bias;     // [n] or null
  const float* weight;  // [M] or null
  void* out;            // rows ldo apart
  int64_t ldo;
};

struct ExpertKernels {
  void (*gated_forward[3])(const GatedForward&);
  void (*gated_backward[3])(const GatedBackward&);
  void (*store_rows[3])(const StoreRows&);
  // out[0..n) = sum_k weight[k] * rows[k] in fp32, rounded once; weight may be null (all ones)
  void (*combine[3])(const void* const* rows, const float* weight, int64_t K, void* out, int64_t n);
  // <a, b>
  float (*row_dot[3])(const void* a, const void* b, int64_t n);
};
#define X(name) SAIL_DECLARE_TABLE(name, ExpertKernels, kExperts)
SAIL_FOR_EACH_ISA(X)
#undef X

inline const ExpertKernels& expert_kernels() {
#define X(name) SAIL_TABLE_ADDRESS(name, kExperts)
  static const ExpertKernels* const tables[] = {SAIL_FOR_EACH_ISA(X)};
#undef X
  return *tables[static_cast<int>(active_isa())];
}
}  // namespace sail::cpu
