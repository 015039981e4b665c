// From a problem to a kernel for Hopper: tensor maps, dtype and head dim. False: the problem is not for TMA; nothing was
// launched. `start` makes a tensor map and launches a kernel, on a card or in a test on the CPU:
// start.encode(box, &map), start.launch(kernel, blocks, threads, bytes of shared memory, arguments).
#pragma once
#include "attention_forward_sm90.cuh"

namespace sail::cuda::sm90 {
// [batches, tokens, heads, D], in boxes of `rows` tokens of one head. Strides rise from dimension to dimension where the
// tensor is contiguous, as the driver's documentation has them; a dimension of one takes any stride.
inline TensorBox head_box(const HeadRows& x, int64_t D, int64_t tokens, int64_t heads, int64_t batches, uint32_t rows) {
  TensorBox b;
  b.data = x.data, b.dims = 4;
  const int64_t sizes[4] = {D, heads, tokens, batches}, strides[3] = {x.head, x.token, x.batch};
  for (int i = 0; i < 4; i++) b.size[i] = static_cast<uint64_t>(sizes[i]), b.box[i] = 1;
  for (int i = 0; i < 3; i++) b.stride[i] = static_cast<uint64_t>(sizes[i + 1] > 1 ? strides[i] : kBoxElements) * 2;
  b.box[0] = kBoxElements, b.box[2] = rows;
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
