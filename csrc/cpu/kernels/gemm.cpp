#include "gemm.h"

#include "gemm_dot.h"
#include "gemm_outer.h"
#include "gemm_wgrad.h"

namespace sail::cpu::SAIL_ISA {
extern const GemmKernels kGemm;
const GemmKernels kGemm = {
    {dot_gemm_kernel<float>, dot_gemm_kernel<bf16>, dot_gemm_kernel<f16>},
    {outer_gemm_kernel<float>, outer_gemm_kernel<bf16>, outer_gemm_kernel<f16>},
    {wgrad_gemm_kernel<float, float>, wgrad_gemm_kernel<bf16, bf16>, wgrad_gemm_kernel<f16, f16>},
    {wgrad_gemm_kernel<float, float>, wgrad_gemm_kernel<bf16, float>, wgrad_gemm_kernel<f16, float>},
};
}  // namespace sail::cpu::SAIL_ISA
