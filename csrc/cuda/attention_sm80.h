// How the attention kernels are launched on a card; attention_forward_sm80.cu and attention_backward_sm80.cu are apart
// because they compile for minutes.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels/attention_dispatch_sm80.cuh"

namespace sail::cuda::sm80 {
struct StartAttention {
  const Launch& with;
  template <class Problem>
  void operator()(void (*kernel)(Problem), int64_t blocks, int threads, int shared_bytes, const Problem& p) const {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    if (blocks > INT32_MAX) throw std::runtime_error("sail_ops: attention: more blocks than a grid has");
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(with.stream)>>>(p);
    check(cudaGetLastError());
  }
  static void check(cudaError_t e) {
    if (e != cudaSuccess) throw std::runtime_error(std::string("sail_ops: attention: CUDA: ") + cudaGetErrorString(e));
  }
};

template <class Problem> void run(const Problem& a, const Launch& launch) {
  if (launch.dtype == Element::bf16) return dispatch<__nv_bfloat16>(a, StartAttention{launch});
  dispatch<__half>(a, StartAttention{launch});
}
}  // namespace sail::cuda::sm80
