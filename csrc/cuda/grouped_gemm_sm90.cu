// The grouped GEMM for Hopper; grouped_gemm_sm90_bf16.cu and _f16.cu hold its kernels.
#include "grouped_gemm_sm90.h"

namespace sail::cuda::sm90 {
namespace {
template <class Problem, class Arguments>
bool by_dtype(const Problem& p, const Arguments& out, const Launch& launch) {
  if (launch.shared_limit < kSharedBytes) return false;
  return launch.dtype == Element::bf16 ? run<__nv_bfloat16>(p, out, launch) : run<__half>(p, out, launch);
}
}  // namespace
bool grouped_gemm(const RowsProblem& p, const StoreRows& out, const Launch& launch) { return by_dtype(p, out, launch); }
bool grouped_gemm(const RowsProblem& p, const GatedForward& out, const Launch& launch) {
  return by_dtype(p, out, launch);
}
bool grouped_gemm(const RowsProblem& p, const GatedBackward& out, const Launch& launch) {
  return by_dtype(p, out, launch);
}
bool grouped_gemm(const WgradProblem& p, const StoreGrad& out, const Launch& launch) {
  return by_dtype(p, out, launch);
}
}  // namespace sail::cuda::sm90
