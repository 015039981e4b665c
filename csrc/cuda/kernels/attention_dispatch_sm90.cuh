// From a problem to a kernel for Hopper: tensor maps, dtype and head dim. False: the problem is not for TMA; nothing was
// launched. `start` makes a tensor map and launches a kernel, on a card or in a test on the CPU:
// start.encode(box, &map), start.launch(kernel, blocks, threads, bytes of shared memory, arguments).
#pragma once
#include "attention_forward_sm90.cuh"

namespace sail::cuda::sm90 {
// [batches, heads, tokens, D], in boxes of `box_rows` tokens of one head. A dimension of one takes any stride.
inline TensorBox head_box(const HeadRows& x, int64_t D, int64_t tokens, int64_t heads, int64_t batches,
                          uint32_t box_rows) {
  TensorBox b = tensor_box(x.data, D, tokens, tokens > 1 ? x.token : kBoxElements, heads, x.head, box_rows);
  b.dims = 4;
  b.size[3] = static_cast<uint64_t>(batches), b.box[3] = 1;
  b.stride[2] = batches > 1 ? static_cast<uint64_t>(x.batch) * 2 : b.stride[0];
  return b;
}

template <class T, int D, class Start> bool start_forward(const AttentionForward& a, const Start& start) {
  using Shape = ForwardShape<D>;
  const int64_t batches = a.cu_q ? 1 : a.B;
  ForwardArguments args{{}, {}, {}, a};
  if (!start.encode(head_box(a.q, a.D, a.S, a.H, batches, Shape::kM), &args.q) ||
      !start.encode(head_box(a.k, a.D, a.L, a.G, batches, Shape::kN), &args.k) ||
      !start.encode(head_box(a.v, a.D, a.L, a.G, batches, kTileK), &args.v))
    return false;
  start.launch(attention_forward_kernel<T, Shape>, most_blocks(a.cu_q, a.B, a.S, Shape::kM) * a.H, Shape::kThreads,
               ForwardShared<Shape>::kBytes, args);
  return true;
}

template <class T, class Start> bool dispatch(const AttentionForward& a, const Start& start) {
  if (a.D <= 64) return start_forward<T, 64>(a, start);
  if (a.D <= 80) return start_forward<T, 80>(a, start);
  if (a.D <= 96) return start_forward<T, 96>(a, start);
  return start_forward<T, 128>(a, start);
}
}  // namespace sail::cuda::sm90
