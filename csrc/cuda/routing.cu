// The router on CUDA: check, plan, launch. Nothing synchronizes; ids to replay are checked under SAIL_OPS_CHECK=1 alone.
#include <math.h>

#include <vector>

#include "../torch/routing.h"
#include "kernels/route_topk.cuh"
#include "moe.h"

namespace sail::cuda {
namespace {
using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor>;

DType check_logits_cuda(const Check& c, const Tensor& logits) {
  const DType dtype = check_logits(c, logits);
  c.that(logits.size(1) <= kRouteMaxExperts, "logits_TE", "E = " + std::to_string(logits.size(1)),
         "at most " + std::to_string(kRouteMaxExperts) + " experts on a CUDA device");
  c.that(logits.size(0) <= INT32_MAX, "logits_TE", std::to_string(logits.size(0)) + " tokens", "at most 2147483647");
  return dtype;
}

// Their values under SAIL_OPS_CHECK=1 alone, which waits for the device.
void check_ids_cuda(const Check& c, const Tensor& ids, int64_t T, int64_t K, const Tensor& logits,
                    const Stream& stream) {
  const int64_t bytes = check_ids(c, ids, T, K, logits) ? 8 : 4;
  if (!check_values()) return;
  std::vector<char> values(T * K * bytes);
  copy_to_host(values.data(), ids.data(), bytes, T * K, bytes, stream);
  for (int64_t i = 0; i < T * K; i++)
    check_id(c,
             bytes == 8 ? reinterpret_cast<const int64_t*>(values.data())[i]
                        : reinterpret_cast<const int32_t*>(values.data())[i],
             logits.size(1));
}

template <class F> void dispatch_dtype(DType dtype, F f) {
  dispatch(dtype, false, [&](auto t, auto) { f(t); });
}

Routed route_topk_cuda(const Tensor& logits, int64_t K, bool renormalize, const OptTensor& bias,
                       const OptTensor& replay, const OptTensor& mask) {
  const Check c("route_topk");
  const DType dtype = check_logits_cuda(c, logits);
  const int64_t T = logits.size(0), E = logits.size(1);
  check_top_k(c, K, E);
  const float* bias_E = check_floats(c, "bias_E", bias, {E}, logits);
  const bool* mask_T = check_mask(c, mask, T, logits);
  const DeviceGuard guard(logits.device_index());
  const Stream stream = current_stream(c, logits);
  if (replay) check_ids_cuda(c, *replay, T, K, logits, stream);

  const int64_t by_token[] = {T, K}, by_expert[] = {E};
  Tensor weights = logits.empty(by_token, aoti_torch_dtype_float32());
  Tensor ids = logits.empty(by_token, aoti_torch_dtype_int64());
  Tensor counts = logits.empty(by_expert, aoti_torch_dtype_int64());
  Tensor prob_sum = logits.empty(by_expert, aoti_torch_dtype_float32());
  const RoutePlan plan = plan_route(T, E);
  const int64_t partial[] = {plan.blocks, E};
  const Tensor sums = logits.empty(partial, aoti_torch_dtype_float32());
  const Tensor block_counts = logits.empty(partial, aoti_torch_dtype_int32());
  Route a = {};
  a.logits = logits.data(), a.stride = logits.stride(0), a.bias = bias_E, a.mask = mask_T;
  if (replay) a.replay = replay->data(), a.wide_replay = replay->dtype() == aoti_torch_dtype_int64();
  a.ids = ids.ptr<int64_t>(), a.weights = weights.ptr<float>();
  a.sums = sums.ptr<float>(), a.counts = block_counts.ptr<int32_t>();
  a.T = T, a.E = static_cast<int32_t>(E), a.K = static_cast<int32_t>(K), a.tokens = plan.tokens;
  a.renormalize = renormalize;
  dispatch_dtype(dtype, [&](auto t) {
    if (T) launch(route_topk_kernel<decltype(t)>, plan.blocks, plan.warps * 32, route_shared(E, plan.warps), stream, a);
  });
  launch(sum_statistics_kernel, (E + kStatisticsColumns - 1) / kStatisticsColumns,
         dim3(kStatisticsColumns, kStatisticsGroups), 0, stream, a.sums, a.counts, plan.blocks, a.E,
         counts.ptr<int64_t>(), prob_sum.ptr<float>());
  return {std::move(weights), std::move(ids), std::move(counts), std::move(prob_sum)};
}

Tensor route_topk_backward_cuda(const OptTensor& grad_weights, const OptTensor& grad_prob_sum, const Tensor& logits,
                                const Tensor& ids, const OptTensor& mask, bool renormalize) {
  const Check c("route_topk_backward");
  const DType dtype = check_logits_cuda(c, logits);
  c.rank("ids_TK", ids, 2);
  const int64_t T = logits.size(0), E = logits.size(1), K = ids.size(1);
  const float* dweights = check_floats(c, "grad_weights_TK", grad_weights, {T, K}, logits);
  const float* dsum = check_floats(c, "grad_prob_sum_E", grad_prob_sum, {E}, logits);
  const bool* mask_T = check_mask(c, mask, T, logits);
  const DeviceGuard guard(logits.device_index());
  const Stream stream = current_stream(c, logits);
  check_ids_cuda(c, ids, T, K, logits, stream);
  Tensor dlogits = logits.empty_like();
  if (!T) return dlogits;
  RouteBackward a = {};
  a.logits = logits.data(), a.stride = logits.stride(0), a.mask = mask_T, a.dlogits = dlogits.data();
  a.ids = ids.data(), a.wide_ids = ids.dtype() == aoti_torch_dtype_int64();
  a.grad_weights = dweights, a.grad_prob_sum = dsum, a.renormalize = renormalize;
  a.T = T, a.E = static_cast<int32_t>(E), a.K = static_cast<int32_t>(K);
  const int warps = plan_route(T, E).warps;
  dispatch_dtype(dtype, [&](auto t) {
    launch(route_topk_backward_kernel<decltype(t)>, (T + warps - 1) / warps, warps * 32, 2 * warps * E * 4, stream, a);
  });
  return dlogits;
}

const auto library = Library::impl("sail_ops", "CUDA")
                         .kernel<route_topk_cuda>("route_topk")
                         .kernel<route_topk_backward_cuda>("route_topk_backward");
}  // namespace
}  // namespace sail::cuda
