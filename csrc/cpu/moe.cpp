// fused_experts and grouped_experts on the CPU: checks, routing metadata, the call.
#include "moe.h"

#include <limits>
#include <tuple>

namespace sail::cpu {
namespace {
using OptTensor = std::optional<Tensor>;
using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Bits of `needs`: which gradients are wanted; kOverwrite: main gradients are set, not added to.
enum Need {
  kNeedX = 1,
  kNeedGateUp = 2,
  kNeedDown = 4,
  kNeedWeights = 8,
  kNeedGateUpBias = 16,
  kNeedDownBias = 32,
  kOverwrite = 64
};

// The layer's own tensors, as every op of the family takes them.
struct Weights {
  const Tensor& gate_up;
  const OptTensor &up, &gate_up_bias, &down_bias;
  const Tensor& down;
  int64_t activation;
  const std::optional<double>& clamp;
};

GateUp gate_up_view(const Tensor& gate_up, const OptTensor& up, int64_t bytes) {
  GateUp g;
  const int64_t half = gate_up.numel() / gate_up.size(0) * bytes / (up ? 1 : 2);
  g.gate = gate_up.ptr<char>();
  g.up = up ? up->ptr<char>() : g.gate + half;
  g.expert_bytes = up ? half : 2 * half;
  return g;
}

Layer check_layer(const Check& c, const Tensor& x, const Weights& w) {
  Layer l{};
  c.rank("x", x, 2);
  l.dtype = c.real("x", x);
  l.bytes = l.dtype == DType::f32 ? 4 : 2;
  c.rank("down", w.down, 3);
  l.T = x.size(0), l.D = x.size(1), l.E = w.down.size(0), l.F = w.down.size(2);
  c.positive("x", "D", l.D);
  c.positive("down", "E", l.E);
  c.positive("down", "F", l.F);
  c.shape("down", w.down, {l.E, l.D, l.F});
  c.shape(w.up ? "gate" : "gate_up", w.gate_up, {l.E, w.up ? l.F : 2 * l.F, l.D});
  const auto weight = [&](const char* name, const Tensor& t) {
    c.dtype(name, t, x.dtype());
    c.same_device(name, t, x);
    c.contiguous(name, t);
  };
  weight("down", w.down);
  weight(w.up ? "gate" : "gate_up", w.gate_up);
  if (w.up) c.shape("up", *w.up, {l.E, l.F, l.D}), weight("up", *w.up);
  if (w.gate_up_bias) c.shape("gate_up_bias", *w.gate_up_bias, {l.E, 2 * l.F}), weight("gate_up_bias", *w.gate_up_bias);
  if (w.down_bias) c.shape("down_bias", *w.down_bias, {l.E, l.D}), weight("down_bias", *w.down_bias);
  c.that(x.stride(1) == 1 || l.D == 1, "x", "rows of stride " + std::to_string(x.stride(1)), "rows of stride 1");
  c.that(!w.clamp || *w.clamp > 0, "clamp", w.clamp ? std::to_string(*w.clamp) : "", "a positive number");
  c.that(w.activation >= 0 && w.activation <= 2, "activation", std::to_string(w.activation), "0, 1 or 2");
  l.x = x.ptr<const char>();
  l.x_row_bytes = x.stride(0) * l.bytes;
  l.gate_up = gate_up_view(w.gate_up, w.up, l.bytes);
  l.down = w.down.ptr<char>();
  l.gate_up_bias = w.gate_up_bias ? w.gate_up_bias->ptr<const char>() : nullptr;
  l.down_bias = w.down_bias ? w.down_bias->ptr<const char>() : nullptr;
  l.activation = static_cast<Activation>(w.activation);
  l.clamp = w.clamp ? static_cast<float>(*w.clamp) : std::numeric_limits<float>::infinity();
  l.threads = num_threads();
  return l;
}

float value_at(const Tensor& t, int64_t offset) {
  if (t.dtype() == aoti_torch_dtype_float32()) return t.ptr<const float>()[offset];
  const uint16_t bits = t.ptr<const uint16_t>()[offset];
  return t.dtype() == aoti_torch_dtype_bfloat16() ? bf16_to_float(bits) : f16_to_float(bits);
}

void check_weights_dtype(const Check& c, const Tensor& weights, const Tensor& x) {
  c.that(weights.dtype() == aoti_torch_dtype_float32() || weights.dtype() == x.dtype(), "weights",
         dtype_name(weights.dtype()), std::string("float32 or x's dtype, ") + dtype_name(x.dtype()));
  c.same_device("weights", weights, x);
}

// A stable counting sort of the T * K ids by expert; ids outside [0, E) own no row.
Rows route(const Check& c, const Tensor& ids, const Tensor& weights, const Tensor& x, int64_t E) {
  c.rank("ids", ids, 2);
  const int64_t T = x.size(0), K = ids.size(1);
  c.shape("ids", ids, {T, K});
  c.positive("ids", "K", K);
  c.shape("weights", weights, {T, K});
  c.same_device("ids", ids, x);
  check_weights_dtype(c, weights, x);
  c.that(T * K <= INT32_MAX, "ids", std::to_string(T * K) + " routed rows",
         "at most 2147483647, what an int32 indexes");
  const bool wide = c.is_int64("ids", ids);
  const auto id = [&](int64_t t, int64_t k) {
    const int64_t at = t * ids.stride(0) + k * ids.stride(1);
    return wide ? ids.ptr<const int64_t>()[at] : ids.ptr<const int32_t>()[at];
  };
  Rows rows;
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
Rows sorted_rows(const Check& c, const Tensor& offsets, const OptTensor& weights, const Tensor& x, int64_t E) {
  Rows rows;
  rows.offsets = check_offsets(c, offsets, x, E);
  rows.flat.resize(rows.count());
  rows.weight.assign(rows.count(), 1.f);
  if (weights) c.shape("weights", *weights, {x.size(0)}), check_weights_dtype(c, *weights, x);
  for (int64_t r = 0; r < rows.count(); r++) {
    rows.flat[r] = static_cast<int32_t>(r);
    if (weights) rows.weight[r] = value_at(*weights, r * weights->stride(0));
  }
  return rows;
}

template <size_t N> Tensor empty_huge(const Tensor& like, const int64_t (&sizes)[N], int32_t dtype) {
  Tensor t = like.empty(sizes, dtype);
  advise_huge_pages(t.data(), t.numel() * (dtype == aoti_torch_dtype_float32() ? 4 : 2));
  return t;
}

Tensor saved_h(const Layer& l, const Tensor& x, int64_t rows, bool save) {
  return empty_huge(x, {save ? rows : 0, 2 * l.F}, x.dtype());
}

std::tuple<Tensor, Tensor> fused_experts(const Tensor& x, const Tensor& gate_up, const OptTensor& up,
                                         const Tensor& down, const Tensor& ids, const Tensor& weights,
                                         const OptTensor& gate_up_bias, const OptTensor& down_bias, int64_t activation,
                                         const std::optional<double>& clamp, bool save_h) {
  const Check c("fused_experts");
  const Layer l = check_layer(c, x, {gate_up, up, gate_up_bias, down_bias, down, activation, clamp});
  const Rows rows = route(c, ids, weights, x, l.E);
  Tensor y = x.empty({l.T, l.D}, x.dtype()), h = saved_h(l, x, l.T * rows.K, save_h);
  experts_forward(l, rows, false, save_h ? h.ptr<char>() : nullptr, y.ptr<char>());
  return {std::move(y), std::move(h)};
}

std::tuple<Tensor, Tensor> grouped_experts(const Tensor& x, const Tensor& gate_up, const OptTensor& up,
                                           const Tensor& down, const Tensor& offsets, const OptTensor& weights,
                                           const OptTensor& gate_up_bias, const OptTensor& down_bias,
                                           int64_t activation, const std::optional<double>& clamp, bool save_h) {
  const Check c("grouped_experts");
  const Layer l = check_layer(c, x, {gate_up, up, gate_up_bias, down_bias, down, activation, clamp});
  const Rows rows = sorted_rows(c, offsets, weights, x, l.E);
  Tensor y = x.empty({l.T, l.D}, x.dtype()), h = saved_h(l, x, l.T, save_h);
  experts_forward(l, rows, true, save_h ? h.ptr<char>() : nullptr, y.ptr<char>());
  return {std::move(y), std::move(h)};
}

// A gradient buffer of the caller's: fp32 or the weight's dtype.
WeightGrad check_main_grad(const Check& c, const char* name, const Tensor& buffer, const Tensor& weight, Output mode) {
  const bool fp32 = buffer.dtype() == aoti_torch_dtype_float32();
  c.that(fp32 || buffer.dtype() == weight.dtype(), name, dtype_name(buffer.dtype()),
         std::string("float32 or the weight's dtype, ") + dtype_name(weight.dtype()));
  bool same = buffer.dim() == 3;
  for (int i = 0; i < 3 && same; i++) same = buffer.size(i) == weight.size(i);
  c.that(same, name, "shape " + shape_text(buffer), "the weight's shape " + shape_text(weight));
  c.contiguous(name, buffer);
  return {mode, fp32};
}

Grads backward(const Check& c, const Layer& l, const Rows& rows, bool sorted, const Weights& w, const Tensor& dy,
               const Tensor& x, const Tensor& h, int64_t needs, const OptTensor& main_gate_up, const OptTensor& main_up,
               const OptTensor& main_down) {
  c.dtype("dy", dy, x.dtype());
  c.shape("dy", dy, {l.T, l.D});
  c.contiguous("dy", dy);
  const bool saved = h.size(0) > 0;
  if (saved) c.shape("h", h, {sorted ? l.T : l.T * rows.K, 2 * l.F}), c.contiguous("h", h), c.dtype("h", h, x.dtype());

  const int32_t dt = x.dtype();
  const auto none = [&] { return x.empty({0}, dt); };
  const auto wanted = [&](int64_t bit) { return (needs & bit) != 0; };
  const Output mode = wanted(kOverwrite) ? Output::overwrite : Output::accumulate;
  Gradients g;
  Tensor dx = wanted(kNeedX) ? x.empty({l.T, l.D}, dt) : none();
  if (wanted(kNeedX)) g.x = dx.ptr<char>();

  const bool own_gate_up = wanted(kNeedGateUp) && !main_gate_up, own_down = wanted(kNeedDown) && !main_down;
  Tensor dgate_up = own_gate_up ? empty_huge(x, {l.E, w.up ? l.F : 2 * l.F, l.D}, dt) : none();
  Tensor dup = own_gate_up && w.up ? empty_huge(x, {l.E, l.F, l.D}, dt) : none();
  Tensor ddown = own_down ? empty_huge(x, {l.E, l.D, l.F}, dt) : none();
  if (wanted(kNeedGateUp) && main_gate_up) {
    c.that(main_up.has_value() == w.up.has_value(), "main_grads", "another number of buffers", "one buffer a weight");
    g.gate_up_as = check_main_grad(c, "main_grads", *main_gate_up, w.gate_up, mode);
    if (w.up)
      check_main_grad(c, "main_grads", *main_up, *w.up, mode), c.dtype("main_grads", *main_up, main_gate_up->dtype());
    g.gate_up = gate_up_view(*main_gate_up, main_up, g.gate_up_as.fp32 ? 4 : l.bytes);
  } else if (own_gate_up) {
    OptTensor none_up;
    g.gate_up = w.up ? GateUp{dgate_up.ptr<char>(), dup.ptr<char>(), l.F * l.D * l.bytes}
                     : gate_up_view(dgate_up, none_up, l.bytes);
  }
  if (wanted(kNeedDown) && main_down) {
    g.down_as = check_main_grad(c, "main_grads", *main_down, w.down, mode);
    g.down = main_down->ptr<char>();
  } else if (own_down) {
    g.down = ddown.ptr<char>();
  }

  const int32_t f32 = aoti_torch_dtype_float32();
  Tensor dweights = !wanted(kNeedWeights) ? x.empty({0}, f32)
                    : sorted              ? x.empty({l.T}, f32)
                                          : x.empty({l.T, rows.K}, f32);
  std::vector<float> by_row(rows.count());
  if (wanted(kNeedWeights)) g.weight = by_row.data();
  Tensor dgate_up_bias = wanted(kNeedGateUpBias) ? x.empty({l.E, 2 * l.F}, dt) : none();
  if (wanted(kNeedGateUpBias)) g.gate_up_bias = dgate_up_bias.ptr<char>();
  Tensor ddown_bias = wanted(kNeedDownBias) ? x.empty({l.E, l.D}, dt) : none();
  if (wanted(kNeedDownBias)) g.down_bias = ddown_bias.ptr<char>();

  experts_backward(l, rows, sorted, dy.ptr<const char>(), saved ? h.ptr<const char>() : nullptr, g);

  if (wanted(kNeedWeights)) {
    float* out = dweights.ptr<float>();
    std::fill(out, out + dweights.numel(), 0.f);  // dropped ids and tail rows
    for (int64_t r = 0; r < rows.count(); r++) out[rows.flat[r]] = by_row[r];
  }
  return {std::move(dx),       std::move(dgate_up),      std::move(dup),       std::move(ddown),
          std::move(dweights), std::move(dgate_up_bias), std::move(ddown_bias)};
}

Grads fused_experts_backward(const Tensor& dy, const Tensor& x, const Tensor& gate_up, const OptTensor& up,
                             const Tensor& down, const Tensor& ids, const Tensor& weights, const Tensor& h,
                             const OptTensor& gate_up_bias, const OptTensor& down_bias, int64_t activation,
                             const std::optional<double>& clamp, int64_t needs, const OptTensor& main_gate_up,
                             const OptTensor& main_up, const OptTensor& main_down) {
  const Check c("fused_experts_backward");
  const Weights w{gate_up, up, gate_up_bias, down_bias, down, activation, clamp};
  const Layer l = check_layer(c, x, w);
  const Rows rows = route(c, ids, weights, x, l.E);
  return backward(c, l, rows, false, w, dy, x, h, needs, main_gate_up, main_up, main_down);
}

Grads grouped_experts_backward(const Tensor& dy, const Tensor& x, const Tensor& gate_up, const OptTensor& up,
                               const Tensor& down, const Tensor& offsets, const OptTensor& weights, const Tensor& h,
                               const OptTensor& gate_up_bias, const OptTensor& down_bias, int64_t activation,
                               const std::optional<double>& clamp, int64_t needs, const OptTensor& main_gate_up,
                               const OptTensor& main_up, const OptTensor& main_down) {
  const Check c("grouped_experts_backward");
  const Weights w{gate_up, up, gate_up_bias, down_bias, down, activation, clamp};
  const Layer l = check_layer(c, x, w);
  const Rows rows = sorted_rows(c, offsets, weights, x, l.E);
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
