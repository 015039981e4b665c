// How the attention kernels are launched on a card; attention_forward_sm80.cu and attention_backward_sm80.cu are apart
// because they compile for minutes.
#pragma once
#include "launch.h"

#include "kernels/attention_dispatch_sm80.cuh"

namespace sail::cuda::sm80 {
struct StartAttention {
  const Launch& with;
  template <class Problem>
  void operator()(void (*kernel)(Problem), int64_t blocks, int threads, int shared_bytes, const Problem& a) const {
    if (blocks > INT32_MAX) throw std::runtime_error("sail_ops: attention: more blocks than a grid has");
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         shared_bytes);  // check_launch sees its error
    cuda::launch(kernel, static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(with.stream),
                 a);
    check_launch("attention");
  }
};

template <class Problem> void run(const Problem& a, const Launch& launch) {
  if (launch.dtype == Element::bf16) return dispatch<__nv_bfloat16>(a, StartAttention{launch});
  dispatch<__half>(a, StartAttention{launch});
}
}  // namespace sail::cuda::sm80
