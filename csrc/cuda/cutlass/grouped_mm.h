// CUTLASS's grouped GEMM behind grouped_mm, in libraries built with SAIL_OPS_CUTLASS=ON.
#pragma once
#include "../kernels/grouped_gemm.h"

namespace sail::cuda {
// Whether it can: weights contiguous along k, rows in order, nothing fused, everything on 16 bytes.
bool cutlass_takes(const RowsProblem& p, const StoreRows& out);
int64_t cutlass_workspace(const RowsProblem& p, const Launch& launch);  // bytes, 256-byte aligned
bool cutlass_grouped_gemm(const RowsProblem& p, const StoreRows& out, const Launch& launch, void* memory);
}  // namespace sail::cuda
