// fused_experts and grouped_experts on the CPU: checks, routing metadata, the call.
#include "moe.h"

#include <tuple>

namespace sail::cpu {
namespace {
Layer make_layer(const Check& c, const Tensor& x, const ExpertWeights& w) {
  return {check_layer(c, x, w), num_threads()};
}

float value_at(const Tensor& t, int64_t offset) {
  if (t.dtype() == aoti_torch_dtype_float32()) return t.ptr<const float>()[offset];
  const uint16_t bits = t.ptr<const uint16_t>()[offset];
  return t.dtype() == aoti_torch_dtype_bfloat16() ? bf16_to_float(bits) : f16_to_float(bits);
}

// A stable counting sort of the T * K ids by expert; ids outside [0, E) own no row.
RoutedRows route(const Check& c, const Tensor& ids, const Tensor& weights, const Tensor& x, int64_t E) {
  const int64_t T = x.size(0), K = check_routing(c, ids, weights, x);
  const bool wide = c.is_int64("ids", ids);
  const auto id = [&](int64_t t, int64_t k) {
    const int64_t at = t * ids.stride(0) + k * ids.stride(1);
    return wide ? ids.ptr<const int64_t>()[at] : ids.ptr<const int32_t>()[at];
  };
  RoutedRows rows;
  rows.K = K;
  rows.offsets.assign(E + 1, 0);
  for (int64_t t = 0; t < T; t++)
    for (int64_t k = 0; k < K; k++)
      if (const int64_t e = id(t, k); e >= 0 && e < E) rows.offsets[e + 1]++;
  for (int64_t e = 0; e < E; e++) rows.offsets[e + 1] += rows.offsets[e];
  rows.flat.resize(rows.count());
  rows.weight.resize(rows.count());
  std::vector<int32_t> next(rows.offsets.begin(), rows.offsets.end() - 1);
  for (int64_t t = 0; t < T; t++)
    for (int64_t k = 0; k < K; k++)
      if (const int64_t e = id(t, k); e >= 0 && e < E) {
        const int32_t r = next[e]++;
        rows.flat[r] = static_cast<int32_t>(t * K + k);
        rows.weight[r] = value_at(weights, t * weights.stride(0) + k * weights.stride(1));
      }
  return rows;
}

// Rows that come sorted, with cumulative ends; rows past the last end are the tail.
RoutedRows sorted_rows(const Check& c, const Tensor& offsets, const OptTensor& weights, const Tensor& x, int64_t E) {
  check_sorted(c, offsets, weights, x, E);
  RoutedRows rows;
  rows.offsets = read_offsets(c, offsets, x, E);
  rows.flat.resize(rows.count());
  rows.weight.assign(rows.count(), 1.f);
  for (int64_t r = 0; r < rows.count(); r++) {
    rows.flat[r] = static_cast<int32_t>(r);
    if (weights) rows.weight[r] = value_at(*weights, r * weights->stride(0));
  }
  return rows;
}

Tensor saved_h(const Layer& l, const Tensor& x, int64_t rows, bool save) {
  return empty_huge(x, {save ? rows : 0, 2 * l.F}, x.dtype());
}

std::tuple<Tensor, Tensor> fused_experts(const Tensor& x, const Tensor& gate_up, const OptTensor& up,
                                         const Tensor& down, const Tensor& ids, const Tensor& weights,
                                         const OptTensor& gate_up_bias, const OptTensor& down_bias, int64_t activation,
                                         const std::optional<double>& clamp, bool save_h) {
  const Check c("fused_experts");
  const Layer l = make_layer(c, x, {gate_up, up, gate_up_bias, down_bias, down, activation, clamp});
  const RoutedRows rows = route(c, ids, weights, x, l.E);
  Tensor y = x.empty({l.T, l.D}, x.dtype()), h = saved_h(l, x, l.T * rows.K, save_h);
  experts_forward(l, rows, false, save_h ? h.ptr<char>() : nullptr, y.ptr<char>());
  return {std::move(y), std::move(h)};
}

std::tuple<Tensor, Tensor> grouped_experts(const Tensor& x, const Tensor& gate_up, const OptTensor& up,
                                           const Tensor& down, const Tensor& offsets, const OptTensor& weights,
                                           const OptTensor& gate_up_bias, const OptTensor& down_bias,
                                           int64_t activation, const std::optional<double>& clamp, bool save_h) {
  const Check c("grouped_experts");
  const Layer l = make_layer(c, x, {gate_up, up, gate_up_bias, down_bias, down, activation, clamp});
  const RoutedRows rows = sorted_rows(c, offsets, weights, x, l.E);
  Tensor y = x.empty({l.T, l.D}, x.dtype()), h = saved_h(l, x, l.T, save_h);
  experts_forward(l, rows, true, save_h ? h.ptr<char>() : nullptr, y.ptr<char>());
  return {std::move(y), std::move(h)};
}

Grads backward(const Check& c, const Layer& l, const RoutedRows& rows, bool sorted, const ExpertWeights& w,
               const Tensor& dy, const Tensor& x, const Tensor& h, int64_t needs, const OptTensor& main_gate_up,
               const OptTensor& main_up, const OptTensor& main_down) {
  const bool saved = check_saved(c, l, dy, x, h, sorted ? l.T : l.T * rows.K);
  const auto outputs = [&](const auto& weights) {
    const auto empty = [](const Tensor& like, const int64_t (&sizes)[3], int32_t dt) {
      return empty_huge(like, sizes, dt);
    };
    return backward_outputs(c, l, w, x, needs, weights, main_gate_up, main_up, main_down, empty);
  };
  const int64_t by_slot[] = {l.T, rows.K}, by_row_only[] = {l.T};
  BackwardOutputs out = sorted ? outputs(by_row_only) : outputs(by_slot);
  std::vector<float> by_row(rows.count());
  float* dweights = out.to.weight;
  if (dweights) out.to.weight = by_row.data();

  experts_backward(l, rows, sorted, dy.ptr<const char>(), saved ? h.ptr<const char>() : nullptr, out.to);

  if (dweights) {
    std::fill(dweights, dweights + out.weights.numel(), 0.f);  // dropped ids and tail rows
    for (int64_t r = 0; r < rows.count(); r++) dweights[rows.flat[r]] = by_row[r];
  }
  return std::move(out).tuple();
}

Grads fused_experts_backward(const Tensor& dy, const Tensor& x, const Tensor& gate_up, const OptTensor& up,
                             const Tensor& down, const Tensor& ids, const Tensor& weights, const Tensor& h,
                             const OptTensor& gate_up_bias, const OptTensor& down_bias, int64_t activation,
                             const std::optional<double>& clamp, int64_t needs, const OptTensor& main_gate_up,
                             const OptTensor& main_up, const OptTensor& main_down) {
  const Check c("fused_experts_backward");
  const ExpertWeights w{gate_up, up, gate_up_bias, down_bias, down, activation, clamp};
  const Layer l = make_layer(c, x, w);
  const RoutedRows rows = route(c, ids, weights, x, l.E);
  return backward(c, l, rows, false, w, dy, x, h, needs, main_gate_up, main_up, main_down);
}

Grads grouped_experts_backward(const Tensor& dy, const Tensor& x, const Tensor& gate_up, const OptTensor& up,
                               const Tensor& down, const Tensor& offsets, const OptTensor& weights, const Tensor& h,
                               const OptTensor& gate_up_bias, const OptTensor& down_bias, int64_t activation,
                               const std::optional<double>& clamp, int64_t needs, const OptTensor& main_gate_up,
                               const OptTensor& main_up, const OptTensor& main_down) {
  const Check c("grouped_experts_backward");
  const ExpertWeights w{gate_up, up, gate_up_bias, down_bias, down, activation, clamp};
  const Layer l = make_layer(c, x, w);
  const RoutedRows rows = sorted_rows(c, offsets, weights, x, l.E);
  if (!weights) needs &= ~kNeedWeights;
  return backward(c, l, rows, true, w, dy, x, h, needs, main_gate_up, main_up, main_down);
}

const auto library = Library::impl("sail_ops", "CPU")
                         .kernel<fused_experts>("fused_experts")
                         .kernel<fused_experts_backward>("fused_experts_backward")
                         .kernel<grouped_experts>("grouped_experts")
                         .kernel<grouped_experts_backward>("grouped_experts_backward");
}  // namespace
}  // namespace sail::cpu
