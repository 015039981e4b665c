// Launches of the grouped GEMM for every card from sm_80 on.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels/dispatch_sm80.cuh"

namespace sail::cuda::sm80 {
namespace {
void check(cudaError_t e) {
  if (e != cudaSuccess) throw std::runtime_error(std::string("sail_ops: grouped GEMM: CUDA: ") + cudaGetErrorString(e));
}

struct Start {
  const Launch& with;
  Tiles tiles(const RowsProblem& p) const { return choose_tiles(p.R, p.E); }
  template <class Shape, class Problem, class Arguments>
  void launch(void (*kernel)(Problem, Arguments), int64_t tiles, const Problem& p, const Arguments& arguments) const {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes));
    const auto blocks = static_cast<unsigned>(grid_blocks(tiles, with.sm_count, Shape::kBlocks));
    kernel<<<blocks, Shape::kThreads, Shape::kSharedBytes, static_cast<cudaStream_t>(with.stream)>>>(p, arguments);
    check(cudaGetLastError());
  }
};

template <class Problem, class Arguments>
void run(const Problem& p, const Arguments& out, const Launch& launch) {
  if (launch.dtype == Element::bf16) return dispatch<__nv_bfloat16>(p, out, Start{launch});
  dispatch<__half>(p, out, Start{launch});
}
}  // namespace

void grouped_gemm(const RowsProblem& p, const StoreRows& out, const Launch& launch) { run(p, out, launch); }
void grouped_gemm(const RowsProblem& p, const GatedForward& out, const Launch& launch) { run(p, out, launch); }
void grouped_gemm(const RowsProblem& p, const GatedBackward& out, const Launch& launch) { run(p, out, launch); }
void grouped_gemm(const WgradProblem& p, const StoreGrad& out, const Launch& launch) { run(p, out, launch); }
}  // namespace sail::cuda::sm80
