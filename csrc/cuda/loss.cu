// Cross-entropy of a linear head on CUDA, a chunk of tokens at a time. The products are torch's, softmax and gradient
// ours. Which tokens have a label only the device knows: all are computed, and those without one get zeros. Nothing
// synchronizes but the check of the labels under SAIL_OPS_CHECK=1.
// T tokens, D hidden, V vocabulary.
#include "../torch/loss.h"

#include <vector>

#include "kernels/softmax_loss.cuh"
#include "launch.h"

namespace sail::cuda {
namespace {
// At most kChunks chunks, as each rounds the head's gradient once; of at least kChunk tokens, where a product's two
// operations a weight already take longer than reading it. As sail_ops/loss.py promises.
constexpr int64_t kChunk = 128, kChunks = 8;
constexpr int64_t kTile = 64;  // tokens: a chunk is whole tiles of a matrix product

int64_t chunk_of(int64_t T) {
  const int64_t even = (T + kChunks - 1) / kChunks, whole = (std::max(even, kChunk) + kTile - 1) / kTile * kTile;
  return std::min(whole, std::max<int64_t>(T, 1));
}

void mm(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate = false) {
  ok(accumulate ? aoti_torch_cuda_addmm_out(out.handle(), out.handle(), a.handle(), b.handle(), 1, 1)
                : aoti_torch_cuda_mm_out(out.handle(), a.handle(), b.handle()),
     "mm");
}

Tensor rows_of(const Tensor& t, int64_t first, int64_t n) {
  return t.view({n, t.size(1)}, {t.stride(0), t.stride(1)}, first * t.stride(0));
}
Tensor transposed(const Tensor& t) { return t.view({t.size(1), t.size(0)}, {t.stride(1), t.stride(0)}); }

void check_labels(const Check& c, const Tensor& labels, int64_t V, int64_t ignore_index, const Stream& stream) {
  const int64_t T = labels.size(0), bytes = c.is_int64("labels", labels) ? 8 : 4;
  std::vector<char> values(T * bytes);
  copy_to_host(values.data(), labels.data(), bytes, T, labels.stride(0) * bytes, stream);
  for (int64_t t = 0; t < T; t++)
    check_label(c,
                bytes == 8 ? reinterpret_cast<const int64_t*>(values.data())[t]
                           : reinterpret_cast<const int32_t*>(values.data())[t],
                t, V, ignore_index);
}

// The chunks: logits, the loss and its gradient in their place, and the products that have a tensor to go to.
void run(const LossSizes& s, const Tensor& hidden, const Tensor& lm_head, SoftmaxLoss a, const Tensor* dhidden,
         const Tensor* dlm_head, const Stream& stream) {
  const int64_t chunk = chunk_of(s.T);
  const char* labels = static_cast<const char*>(a.labels);
  const Tensor buffer = hidden.empty({chunk, s.V}, hidden.dtype());
  const bool vectors = aligned(s.dtype == DType::f32 ? 4 : 2, {buffer.data()}, {s.V});
  int64_t first = 0;
  do {  // once without tokens too: an empty sum of products is zeros
    const int64_t n = std::min(chunk, s.T - first);
    const Tensor x_nD = rows_of(hidden, first, n), logits_nV = rows_of(buffer, 0, n);
    mm(logits_nV, x_nD, transposed(lm_head));
    SoftmaxLoss part = a;
    part.logits = buffer.data(), part.labels = labels + first * a.label_stride * (a.wide_labels ? 8 : 4);
    part.scale = a.scale ? a.scale + first : nullptr, part.logprobs += first, part.lse += first;
    dispatch(s.dtype, vectors, [&](auto t, auto width) {
      if (n) launch(softmax_loss_kernel<decltype(t), decltype(width)::value>, n, kLossThreads, 0, stream, part);
    });
    if (dlm_head) mm(*dlm_head, transposed(logits_nV), x_nD, first > 0);
    if (dhidden) mm(rows_of(*dhidden, first, n), logits_nV, lm_head);
    first += chunk;
  } while (first < s.T);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_cuda(const Tensor& hidden, const Tensor& lm_head,
                                                                     const Tensor& labels, const OptTensor& scale,
                                                                     int64_t ignore_index, double z_loss,
                                                                     bool need_dhidden, bool need_dlm_head) {
  const Check c("linear_cross_entropy");
  const LossSizes s = check_loss(c, hidden, lm_head, labels, z_loss);
  SoftmaxLoss a = {};
  if (scale) a.scale = check_token_weights(c, *scale, hidden);
  const DeviceGuard guard(hidden.device_index());
  const Stream stream = current_stream(c, hidden);
  if (check_values()) check_labels(c, labels, s.V, ignore_index, stream);
  Tensor logprobs = hidden.empty({s.T}, aoti_torch_dtype_float32()), lse = logprobs.empty_like();
  Tensor dhidden = hidden.empty({need_dhidden ? s.T : 0, s.D}, hidden.dtype());
  Tensor dlm_head = lm_head.empty({need_dlm_head ? s.V : 0, s.D}, hidden.dtype());
  a.labels = labels.data(), a.label_stride = labels.stride(0), a.wide_labels = c.is_int64("labels", labels);
  a.logprobs = logprobs.ptr<float>(), a.lse = lse.ptr<float>();
  a.V = s.V, a.ignore_index = ignore_index, a.z_loss = z_loss, a.gradient = need_dhidden || need_dlm_head;
  run(s, hidden, lm_head, a, need_dhidden ? &dhidden : nullptr, need_dlm_head ? &dlm_head : nullptr, stream);
  return {std::move(logprobs), std::move(lse), std::move(dhidden), std::move(dlm_head)};
}

const auto library = Library::impl("sail_ops", "CUDA").kernel<linear_cross_entropy_cuda>("linear_cross_entropy");
}  // namespace
}  // namespace sail::cuda
