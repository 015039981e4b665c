// Attention on CUDA: checks, choice between blocks of queries and splits over the keys, launch. Nothing synchronizes
// unless SAIL_OPS_CHECK=1, which reads cu_seqlens back.
#include "launch.h"

#include <algorithm>
#include <vector>

#include "../torch/attention.h"
#include "card.h"
#include "kernels/attention.h"
#include "moe.h"

namespace sail::cuda {
namespace {
constexpr int64_t kMostHeadDim = 128, kMostTokens = 1 << 30;  // of the kernels; sums of two of them are ints
constexpr int64_t kFewQueries = 8;                            // up to so many are split over the keys
constexpr int64_t kLeastKeys = 256;                           // of a split: four tiles

HeadRows heads_of(const Tensor& t) {
  const int64_t d = t.dim();
  return {t.data(), d == 4 ? t.stride(0) : 0, t.stride(d - 3), t.stride(d - 2)};
}

void check_heads(const Check& c, const char* arg, const Tensor& t, const Tensor& q) {
  c.same_device(arg, t, q);
  c.rank(arg, t, q.dim());
  c.dtype(arg, t, q.dtype());
  if (!t.numel()) return;
  const HeadRows rows = heads_of(t);
  c.that(t.stride(-1) == 1 && aligned(2, {t.data()}, {rows.batch, rows.token, rows.head}), arg,
         "strides of " + std::to_string(rows.token) + ", " + std::to_string(rows.head) + ", " +
             std::to_string(t.stride(-1)),
         "contiguous rows (a last dimension of stride 1) that start on 16 bytes");
}

// All but the sequences; q is [.., H, D], k and v are [.., G, D].
Attention check_tensors(const Check& c, const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal) {
  const DType dtype = c.real("q", q);
  c.that(dtype != DType::f32, "q", "float32", "bfloat16 or float16 on a CUDA device");
  const int64_t D = q.size(-1);
  c.that(D >= 8 && D <= kMostHeadDim && D % 8 == 0, "q", "a head dim of " + std::to_string(D),
         "a multiple of 8 up to " + std::to_string(kMostHeadDim) + " on a CUDA device");
  check_heads(c, "q", q, q), check_heads(c, "k", k, q), check_heads(c, "v", v, q);
  check_attention_shapes(c, q, k, v, scale);
  Attention a = {};
  a.q = heads_of(q), a.k = heads_of(k), a.v = heads_of(v);
  a.B = 1, a.S = q.size(-3), a.L = k.size(-3), a.H = q.size(-2), a.G = k.size(-2), a.D = D;
  a.scale = static_cast<float>(scale), a.causal = causal;
  c.that(a.S < kMostTokens, "q", std::to_string(a.S) + " tokens", "fewer than 2^30");
  c.that(a.L < kMostTokens, "k", std::to_string(a.L) + " tokens", "fewer than 2^30");
  return a;
}

Attention check_attention(const Check& c, const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                          bool causal) {
  c.rank("q", q, 4);
  Attention a = check_tensors(c, q, k, v, scale, causal);
  a.B = q.size(0);
  return a;
}

const int32_t* checked_ends(const Check& c, const char* arg, const Tensor& cu, int64_t total, int64_t most) {
  const auto* ends = cu.ptr<const int32_t>();
  if (!check_values()) return ends;
  std::vector<int32_t> values(cu.size(0));
  const DeviceGuard guard(cu.device_index());
  const Stream stream = current_stream(c, cu);
  copy_to_host(values.data(), ends, 4, cu.size(0), 4, stream);
  check_cu_values(c, arg, values.data(), cu.size(0), total, most);
  return ends;
}

Attention check_attention_varlen(const Check& c, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q,
                                 const Tensor& cu_k, int64_t max_q, int64_t max_k, double scale, bool causal) {
  c.rank("q", q, 3);
  Attention a = check_tensors(c, q, k, v, scale, causal);
  check_cu_seqlens(c, cu_q, cu_k, q);
  a.cu_q = checked_ends(c, "cu_seqlens_q", cu_q, a.S, max_q);
  a.cu_k = checked_ends(c, "cu_seqlens_k", cu_k, a.L, max_k);
  a.B = cu_q.size(0) - 1;
  return a;
}

Launch launch_on(const Check& c, const Tensor& q, const Card& card) {
  Launch launch = {};
  launch.dtype = c.real("q", q) == DType::bf16 ? Element::bf16 : Element::f16;
  launch.sm_count = card.sm_count, launch.shared_limit = card.shared_limit;
  launch.stream = current_stream(c, q).handle, launch.op = c.op();
  return launch;
}

// Of both public forms; max_q, max_k: no sequence has more queries or keys.
void forward(const Check& c, const Tensor& q, AttentionForward a, int64_t max_q, int64_t max_k) {
  const DeviceGuard guard(q.device_index());
  const Card card = card_of(c, q);
  const Launch launch = launch_on(c, q, card);
  if (max_q > kFewQueries || !a.rows()) {
#ifdef SAIL_CUDA_SM90
    if (prefers_sm90(card) && sm90::attention_forward(a, launch)) return;
#endif
    return sm80::attention_forward(a, launch);
  }
  AttentionDecode d = {};
  static_cast<AttentionForward&>(d) = a;
  d.most_queries = std::max<int64_t>(max_q, 1);
  const SplitPlan plan = plan_splits(std::min(max_k, a.L), a.B * a.G, card.sm_count, kLeastKeys);
  d.splits = plan.splits, d.chunk = plan.chunk;
  const int64_t sizes[] = {d.splits, a.rows(), a.D}, rows[] = {d.splits, a.rows()};
  const Tensor out = q.empty(sizes, aoti_torch_dtype_float32()), lse = q.empty(rows, aoti_torch_dtype_float32());
  d.partial_out = out.ptr<float>(), d.partial_lse = lse.ptr<float>();
  sm80::attention_decode(d, launch);
}

std::tuple<Tensor, Tensor> attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                          bool causal) {
  const Check c("attention");
  const Attention a = check_attention(c, q, k, v, scale, causal);
  const int64_t rows[] = {a.B, a.H, a.S};
  Tensor out = q.empty_like(), lse = q.empty(rows, aoti_torch_dtype_float32());
  forward(c, q, {a, out.data(), lse.ptr<float>()}, a.S, a.L);
  return {std::move(out), std::move(lse)};
}

std::tuple<Tensor, Tensor> attention_varlen_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q,
                                                 const Tensor& cu_k, int64_t max_q, int64_t max_k, double scale,
                                                 bool causal) {
  const Check c("attention_varlen");
  const Attention a = check_attention_varlen(c, q, k, v, cu_q, cu_k, max_q, max_k, scale, causal);
  const int64_t rows[] = {a.H, a.S};
  Tensor out = q.empty_like(), lse = q.empty(rows, aoti_torch_dtype_float32());
  forward(c, q, {a, out.data(), lse.ptr<float>()}, max_q, max_k);
  return {std::move(out), std::move(lse)};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Check& c, const Attention& problem, const Tensor& dout,
                                            const OptTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& out,
                                            const Tensor& lse, std::initializer_list<int64_t> lse_shape) {
  check_attention_results(c, dout, dlse, q, out, lse, lse_shape);
  for (const auto& [arg, t] : {std::pair<const char*, const Tensor&>{"dout", dout}, {"out", out}})
    c.that(aligned(2, {t.data()}, {}), arg, "an address that is no multiple of 16", "one that is");
  const DeviceGuard guard(q.device_index());
  const Card card = card_of(c, q);
  Tensor dq = q.empty_like(), dk = k.empty_like(), dv = k.empty_like();
  const int64_t rows[] = {problem.rows(), 2};
  const Tensor stats = q.empty(rows, aoti_torch_dtype_float32());
  AttentionBackward a = {};
  static_cast<Attention&>(a) = problem;
  a.dout = dout.data(), a.out = out.data(), a.lse = lse.ptr<float>(), a.dlse = dlse ? dlse->ptr<float>() : nullptr;
  a.stats = stats.ptr<float>(), a.dq = dq.data(), a.dk = dk.data(), a.dv = dv.data();
  sm80::attention_backward(a, launch_on(c, q, card));
  return {std::move(dq), std::move(dk), std::move(dv)};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_cuda(const Tensor& dout, const OptTensor& dlse, const Tensor& q,
                                                           const Tensor& k, const Tensor& v, const Tensor& out,
                                                           const Tensor& lse, double scale, bool causal) {
  const Check c("attention_backward");
  const Attention a = check_attention(c, q, k, v, scale, causal);
  return backward(c, a, dout, dlse, q, k, out, lse, {a.B, a.H, a.S});
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_backward_cuda(const Tensor& dout, const OptTensor& dlse,
                                                                  const Tensor& q, const Tensor& k, const Tensor& v,
                                                                  const Tensor& out, const Tensor& lse,
                                                                  const Tensor& cu_q, const Tensor& cu_k, int64_t max_q,
                                                                  int64_t max_k, double scale, bool causal) {
  const Check c("attention_varlen_backward");
  const Attention a = check_attention_varlen(c, q, k, v, cu_q, cu_k, max_q, max_k, scale, causal);
  return backward(c, a, dout, dlse, q, k, out, lse, {a.H, a.S});
}

const auto library = Library::impl("sail_ops", "CUDA")
                         .kernel<attention_cuda>("attention")
                         .kernel<attention_varlen_cuda>("attention_varlen")
                         .kernel<attention_backward_cuda>("attention_backward")
                         .kernel<attention_varlen_backward_cuda>("attention_varlen_backward");
}  // namespace
}  // namespace sail::cuda
