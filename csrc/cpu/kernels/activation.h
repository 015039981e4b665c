// Kernels of the element-wise gated activations: n contiguous elements a call. Indexed by DType.
// stream: outputs are 64-byte aligned, and too large for the caches.
#pragma once
#include "../isa.h"

namespace sail::cpu {
struct ActivationKernels {
  void (*swiglu[3])(const void* gate, const void* up, void* out, int64_t n, bool stream);
  void (*swiglu_backward[3])(const void* grad, const void* gate, const void* up, void* dgate, void* dup, int64_t n,
                             bool stream);
};
#define X(name) SAIL_DECLARE_TABLE(name, ActivationKernels, kActivation)
SAIL_FOR_EACH_ISA(X)
#undef X

inline const ActivationKernels& activation_kernels() {
#define X(name) SAIL_TABLE_ADDRESS(name, kActivation)
  static const ActivationKernels* const tables[] = {SAIL_FOR_EACH_ISA(X)};
#undef X
  return *tables[static_cast<int>(active_isa())];
}
}  // namespace sail::cpu
