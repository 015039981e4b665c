// CUTLASS's grouped GEMM behind grouped_mm.
#pragma once
#include "../kernels/grouped_gemm.h"

namespace sail::cuda {
struct CutlassGemm {
  bool (*takes)(const RowsProblem& p, const StoreRows& out);
  int64_t (*workspace)(const RowsProblem& p, const Launch& launch);  // bytes, 256-byte aligned
  void (*run)(const RowsProblem& p, const StoreRows& out, const Launch& launch, void* memory);
};
// Set where its object is linked in (SAIL_OPS_CUTLASS=ON), otherwise null; no other object knows.
extern const CutlassGemm* cutlass_gemm;
}  // namespace sail::cuda
