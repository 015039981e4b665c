// fused_experts and grouped_experts on CUDA: checks, rows by expert, the passes.
#include "moe.h"

namespace sail::cuda {
namespace {
std::tuple<Tensor, Tensor> forward(const Call& call, const ExpertLayer& l, const RowMap& rows, bool save_h) {
  const Tensor& x = call.like;
  Tensor y = x.empty({l.T, l.D}, x.dtype()), h = call.buffer(save_h ? rows.R : 0, 2 * l.F);
  experts_forward(call, l, rows, save_h ? h.data() : nullptr, y.data());
  return {std::move(y), std::move(h)};
}

std::tuple<Tensor, Tensor> fused_experts_cuda(const Tensor& x, const Tensor& gate_up, const OptTensor& up,
                                              const Tensor& down, const Tensor& ids, const Tensor& weights,
                                              const OptTensor& gate_up_bias, const OptTensor& down_bias,
                                              int64_t activation, const std::optional<double>& clamp, bool save_h) {
  const Check c("fused_experts");
  const ExpertLayer l = check_layer(c, x, {gate_up, up, gate_up_bias, down_bias, down, activation, clamp});
  check_routing(c, ids, weights, x);
  const DeviceGuard guard(x.device_index());
  const Call call(c, x);
  return forward(call, l, sort_rows(call, ids, weights, l.E), save_h);
}

std::tuple<Tensor, Tensor> grouped_experts_cuda(const Tensor& x, const Tensor& gate_up, const OptTensor& up,
                                                const Tensor& down, const Tensor& offsets, const OptTensor& weights,
                                                const OptTensor& gate_up_bias, const OptTensor& down_bias,
                                                int64_t activation, const std::optional<double>& clamp, bool save_h) {
  const Check c("grouped_experts");
  const ExpertLayer l = check_layer(c, x, {gate_up, up, gate_up_bias, down_bias, down, activation, clamp});
  check_sorted(c, offsets, weights, x, l.E);
  const DeviceGuard guard(x.device_index());
  const Call call(c, x);
  return forward(call, l, sorted_rows(call, offsets, weights, l.E), save_h);
}

struct Main {
  const OptTensor &gate_up, &up, &down;
};

Tensor empty_gradient(const Tensor& like, const int64_t (&sizes)[3], int32_t dtype) { return like.empty(sizes, dtype); }

Grads backward(const Call& call, const ExpertLayer& l, const RowMap& rows, const ExpertWeights& w, const Tensor& dy,
               const Tensor& h, int64_t needs, const Main& main) {
  const bool saved = check_saved(call.c, l, dy, call.like, h, rows.R);
  const auto outputs = [&](const auto& weights) {
    return backward_outputs(call.c, l, w, call.like, needs, weights, main.gate_up, main.up, main.down, empty_gradient);
  };
  const int64_t by_slot[] = {l.T, rows.K}, by_row[] = {l.T};
  BackwardOutputs out = rows.sorted() ? outputs(by_row) : outputs(by_slot);
  experts_backward(call, l, rows, dy.data(), saved ? h.data() : nullptr, out.to);
  return std::move(out).tuple();
}

Grads fused_experts_backward_cuda(const Tensor& dy, const Tensor& x, const Tensor& gate_up, const OptTensor& up,
                                  const Tensor& down, const Tensor& ids, const Tensor& weights, const Tensor& h,
                                  const OptTensor& gate_up_bias, const OptTensor& down_bias, int64_t activation,
                                  const std::optional<double>& clamp, int64_t needs, const OptTensor& main_gate_up,
                                  const OptTensor& main_up, const OptTensor& main_down) {
  const Check c("fused_experts_backward");
  const ExpertWeights w{gate_up, up, gate_up_bias, down_bias, down, activation, clamp};
  const ExpertLayer l = check_layer(c, x, w);
  check_routing(c, ids, weights, x);
  const DeviceGuard guard(x.device_index());
  const Call call(c, x);
  return backward(call, l, sort_rows(call, ids, weights, l.E), w, dy, h, needs, {main_gate_up, main_up, main_down});
}

Grads grouped_experts_backward_cuda(const Tensor& dy, const Tensor& x, const Tensor& gate_up, const OptTensor& up,
                                    const Tensor& down, const Tensor& offsets, const OptTensor& weights,
                                    const Tensor& h, const OptTensor& gate_up_bias, const OptTensor& down_bias,
                                    int64_t activation, const std::optional<double>& clamp, int64_t needs,
                                    const OptTensor& main_gate_up, const OptTensor& main_up,
                                    const OptTensor& main_down) {
  const Check c("grouped_experts_backward");
  const ExpertWeights w{gate_up, up, gate_up_bias, down_bias, down, activation, clamp};
  const ExpertLayer l = check_layer(c, x, w);
  check_sorted(c, offsets, weights, x, l.E);
  const DeviceGuard guard(x.device_index());
  const Call call(c, x);
  if (!weights) needs &= ~kNeedWeights;
  return backward(call, l, sorted_rows(call, offsets, weights, l.E), w, dy, h, needs,
                  {main_gate_up, main_up, main_down});
}

const auto library = Library::impl("sail_ops", "CUDA")
                         .kernel<fused_experts_cuda>("fused_experts")
                         .kernel<fused_experts_backward_cuda>("fused_experts_backward")
                         .kernel<grouped_experts_cuda>("grouped_experts")
                         .kernel<grouped_experts_backward_cuda>("grouped_experts_backward");
}  // namespace
}  // namespace sail::cuda
