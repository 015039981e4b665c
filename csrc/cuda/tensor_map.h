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

// False: not for TMA, which the box alone decides; what the driver refuses then is a fault, and throws.
inline bool encode(const TensorBox& b, Element dtype, CUtensorMap* map) {
  if (!b.encodable()) return false;
  const uint32_t ones[4] = {1, 1, 1, 1};
  const auto type = dtype == Element::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  // 256 bytes from memory: the second row of 128 belongs to the next step, or the next box
  const CUresult e = encode_tiled()(map, type, static_cast<uint32_t>(b.dims), const_cast<void*>(b.data), b.size,
                                    b.stride, b.box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (e == CUDA_SUCCESS) return true;
  const auto list = [](const auto& values, int count) {
    std::string text = "[";
    for (int i = 0; i < count; i++) text += (i ? ", " : "") + std::to_string(values[i]);
    return text + "]";
  };
  throw std::runtime_error("sail_ops: CUDA: the driver refused a tensor map: error " + std::to_string(e) + ", sizes " +
                           list(b.size, b.dims) + ", strides of " + list(b.stride, b.dims - 1) + " bytes, box " +
                           list(b.box, b.dims) + "; SAIL_OPS_CUDA_KERNELS=sm80 does without");
}
}  // namespace sail::cuda
