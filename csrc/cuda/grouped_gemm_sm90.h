// The launcher of the grouped GEMM for Hopper. The kernels of each dtype have a file of their own: they compile side by
// side, for sm_90a alone, as no other target has wgmma.
#pragma once
#include "kernels/dispatch_sm90.cuh"
#include "tensor_map.h"

namespace sail::cuda::sm90 {
template <class T, class Problem, class Arguments>
bool run(const Problem& p, const Arguments& out, const Launch& launch);

inline void check(cudaError_t e) {
  if (e != cudaSuccess) throw std::runtime_error(std::string("sail_ops: grouped GEMM: CUDA: ") + cudaGetErrorString(e));
}

struct Start {
  const Launch& with;

  bool encode(const TensorBox& b, CUtensorMap* map) const { return cuda::encode(b, with.dtype, map); }

  template <class Arguments>
  void launch(void (*kernel)(Arguments), int64_t tiles, const Arguments& arguments) const {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    const auto blocks = static_cast<unsigned>(tiles < with.sm_count ? tiles : with.sm_count);
    kernel<<<blocks, kThreads, kSharedBytes, static_cast<cudaStream_t>(with.stream)>>>(arguments);
    check(cudaGetLastError());
  }
};
}  // namespace sail::cuda::sm90
