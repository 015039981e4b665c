// How the attention kernels are launched on a card; attention_forward_sm80.cu and attention_backward_sm80.cu are apart
// because they compile for minutes.
#pragma once
#include "launcher.h"

#include "kernels/attention_dispatch_sm80.cuh"

namespace sail::cuda::sm80 {
struct StartAttention {
  const Launch& with;
  template <class Problem>
  void operator()(void (*kernel)(Problem), int64_t blocks, int threads, int shared_bytes, const Problem& a) const {
    launch(kernel, blocks, threads, shared_bytes, stream_of(with), a);
  }
};

template <class Problem> void run(const Problem& a, const Launch& launch) {
  if (launch.dtype == Element::bf16) return dispatch<__nv_bfloat16>(a, StartAttention{launch});
  dispatch<__half>(a, StartAttention{launch});
}
}  // namespace sail::cuda::sm80
