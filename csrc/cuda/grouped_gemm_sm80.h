// The launcher of the sm_80 grouped GEMM. The kernels of each dtype have a file of their own: they compile side by side.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels/gemm_config.h"

namespace sail::cuda::sm80 {
template <class T, class Problem, class Arguments>
void run(const Problem& p, const Arguments& out, const Launch& launch);

inline void check(cudaError_t e) {
  if (e != cudaSuccess) throw std::runtime_error(std::string("sail_ops: grouped GEMM: CUDA: ") + cudaGetErrorString(e));
}

struct Start {
  const Launch& with;
  Tiles tiles(const RowsProblem& p) const { return choose_tiles(p.R, p.E); }
  template <class Shape, class Problem, class Arguments>
  void launch(void (*kernel)(Problem, Arguments), int64_t tiles, const Problem& p, const Arguments& arguments) const {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes));
    cudaLaunchConfig_t config = {};
    config.gridDim = static_cast<unsigned>(grid_blocks(tiles, with.sm_count, Shape::kBlocks));
    config.blockDim = Shape::kThreads;
    config.dynamicSmemBytes = Shape::kSharedBytes;
    config.stream = static_cast<cudaStream_t>(with.stream);
    check(cudaLaunchKernelEx(&config, kernel, p, arguments));
  }
};
}  // namespace sail::cuda::sm80
