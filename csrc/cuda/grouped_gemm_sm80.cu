// The grouped GEMM for every card from sm_80 on; grouped_gemm_sm80_bf16.cu and _f16.cu hold its kernels.
#include "grouped_gemm_sm80.h"

namespace sail::cuda::sm80 {
namespace {
template <class Problem, class Arguments>
void by_dtype(const Problem& p, const Arguments& out, const Launch& launch) {
  launch.dtype == Element::bf16 ? run<__nv_bfloat16>(p, out, launch) : run<__half>(p, out, launch);
}
}  // namespace
void grouped_gemm(const RowsProblem& p, const StoreRows& out, const Launch& launch) { by_dtype(p, out, launch); }
void grouped_gemm(const RowsProblem& p, const GatedForward& out, const Launch& launch) { by_dtype(p, out, launch); }
void grouped_gemm(const RowsProblem& p, const GatedBackward& out, const Launch& launch) { by_dtype(p, out, launch); }
void grouped_gemm(const WgradProblem& p, const StoreGrad& out, const Launch& launch) { by_dtype(p, out, launch); }
}  // namespace sail::cuda::sm80
