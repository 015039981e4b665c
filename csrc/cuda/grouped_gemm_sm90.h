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

  int paired(const RowsProblem& p) const { return with.clusters && with.sm_count > 1 && choose_pairs(p.R, p.E); }

  // paired: clusters of two blocks
  template <class Arguments>
  void launch(void (*kernel)(Arguments), int64_t tiles, const Arguments& arguments, int paired = 0) const {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    const int64_t each = 1 + paired, most = with.sm_count / each * each, all = ceil_div(tiles, each) * each;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = 2, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = static_cast<unsigned>(all < most ? all : most), config.blockDim = kThreads;
    config.dynamicSmemBytes = kSharedBytes, config.stream = static_cast<cudaStream_t>(with.stream);
    config.attrs = &cluster, config.numAttrs = paired ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, arguments));
  }
};
}  // namespace sail::cuda::sm90
