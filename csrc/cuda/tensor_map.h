// Tensor maps of the copy engine, made by the driver.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels/tensor_box.h"

namespace sail::cuda {
// libcuda is not linked: it comes with the driver, and the library loads where there is none.
inline auto encode_tiled() {
  static const auto function = [] {
    void* p = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t e =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &p, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t e = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &p, cudaEnableDefault, &found);
#endif
    if (e != cudaSuccess) throw std::runtime_error(std::string("sail_ops: CUDA: ") + cudaGetErrorString(e));
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("sail_ops: the driver has no tensor maps");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(p);
  }();
  return function;
}

// False: not for TMA.
inline bool encode(const TensorBox& b, Element dtype, CUtensorMap* map) {
  if (!b.encodable()) return false;
  const uint32_t ones[4] = {1, 1, 1, 1};
  const auto type = dtype == Element::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  // 256 bytes from memory: the second row of 128 belongs to the next step, or the next box
  return encode_tiled()(map, type, static_cast<uint32_t>(b.dims), const_cast<void*>(b.data), b.size, b.stride, b.box,
                        ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}
}  // namespace sail::cuda
