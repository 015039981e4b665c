// The launcher of the grouped GEMM for Hopper. The kernels of each dtype have a file of their own: they compile side by
// side, for sm_90a alone, as no other target has wgmma.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels/dispatch_sm90.cuh"

namespace sail::cuda::sm90 {
template <class T, class Problem, class Arguments>
bool run(const Problem& p, const Arguments& out, const Launch& launch);

inline void check(cudaError_t e) {
  if (e != cudaSuccess) throw std::runtime_error(std::string("sail_ops: grouped GEMM: CUDA: ") + cudaGetErrorString(e));
}

// libcuda is not linked: it comes with the driver, and the library loads where there is none.
inline auto encode_tiled() {
  static const auto function = [] {
    void* p = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &p, 12000, cudaEnableDefault, &found));
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &p, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("sail_ops: the driver has no tensor maps");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(p);
  }();
  return function;
}

struct Start {
  const Launch& with;

  bool encode(const TensorBox& b, CUtensorMap* map) const {
    if (!b.encodable()) return false;
    const uint32_t ones[3] = {1, 1, 1};
    const auto type = with.dtype == Element::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    // 256 bytes from memory: the second row of 128 belongs to the next step
    return encode_tiled()(map, type, 3, const_cast<void*>(b.data), b.size, b.stride, b.box, ones,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  }

  template <class Arguments>
  void launch(void (*kernel)(Arguments), int64_t tiles, const Arguments& arguments) const {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    const auto blocks = static_cast<unsigned>(tiles < with.sm_count ? tiles : with.sm_count);
    kernel<<<blocks, kThreads, kSharedBytes, static_cast<cudaStream_t>(with.stream)>>>(arguments);
    check(cudaGetLastError());
  }
};
}  // namespace sail::cuda::sm90
