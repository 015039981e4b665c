// From a problem to kernels: dtype and head dim become types. `start` is how a kernel is launched, on a card or by a test
// on the CPU: start(kernel, blocks, threads, bytes of shared memory, problem).
#pragma once
#include "attention_backward_sm80.cuh"
#include "attention_forward_sm80.cuh"

namespace sail::cuda::sm80 {
constexpr int64_t kMostHeadDim = 128;
template <int D> struct HeadDim {
  static constexpr int value = D;
};
template <class F> void with_head_dim(int64_t D, F f) {
  if (D <= 64) return f(HeadDim<64>{});
  if (D <= 96) return f(HeadDim<96>{});
  f(HeadDim<128>{});
}

template <class Shape, class Kernel, class Problem, class Start>
void start_shape(Kernel kernel, int64_t blocks, const Problem& a, const Start& start) {
  if (blocks) start(kernel, blocks, Shape::kThreads, Shape::kSharedBytes, a);
}

template <class T, class Start> void dispatch(const AttentionForward& a, const Start& start) {
  with_head_dim(a.D, [&](auto head_dim) {
    using Shape = ForwardShape<decltype(head_dim)::value>;
    const int64_t blocks = most_blocks(a.cu_q, a.B, a.S, Shape::kM) * a.H;
    start_shape<Shape>(attention_forward_kernel<T, Shape, AttentionForward>, blocks, a, start);
  });
}

// Blocks of rows of a decode, all heads of a group being rows of it
inline int64_t decode_blocks(const AttentionDecode& a) {
  return ceil_div(a.most_queries * (a.H / a.G), DecodeShape<64>::kM) * a.B * a.G;
}
template <class T, class Start> void dispatch(const AttentionDecode& a, const Start& start) {
  with_head_dim(a.D, [&](auto head_dim) {
    using Shape = DecodeShape<decltype(head_dim)::value>;
    start_shape<Shape>(attention_forward_kernel<T, Shape, AttentionDecode>, decode_blocks(a) * a.splits, a, start);
  });
  const int64_t blocks = ceil_div(a.rows(), kCombineThreads / 32);
  if (blocks) start(attention_combine_kernel<T>, blocks, kCombineThreads, 0, a);
}

template <class T, class Start> void dispatch(const AttentionBackward& a, const Start& start) {
  const int64_t blocks = ceil_div(a.rows(), kStatsThreads / 16);
  if (blocks) start(attention_stats_kernel<T>, blocks, kStatsThreads, 0, a);
  with_head_dim(a.D, [&](auto head_dim) {
    using Query = QueryGradShape<decltype(head_dim)::value>;
    using Key = KeyGradShape<decltype(head_dim)::value>;
    start_shape<Key>(attention_key_grad_kernel<T, Key>, most_blocks(a.cu_k, a.B, a.L, Key::kM) * a.G, a, start);
    start_shape<Query>(attention_query_grad_kernel<T, Query>, most_blocks(a.cu_q, a.B, a.S, Query::kM) * a.H, a, start);
  });
}
}  // namespace sail::cuda::sm80
