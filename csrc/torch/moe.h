// What the expert layer's host code shares between devices: the checks of its arguments, and where its gradients go.
// T tokens, D hidden, F expert width, E experts, K top-k, R routed rows.
#pragma once
#include <limits>

#include "checks.h"

namespace sail {
using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Bits of `needs`, those of sail_ops/_autograd.py: which gradients are wanted; kOverwrite: main gradients are set, not
// added to.
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
struct ExpertWeights {
  const Tensor& gate_up;
  const OptTensor &up, &gate_up_bias, &down_bias;
  const Tensor& down;
  int64_t activation;
  const std::optional<double>& clamp;
};

// gate and up halves of [E, 2F, D], or of a pair of [E, F, D]; also of their gradients.
struct GateUp {
  char *gate = nullptr, *up = nullptr;
  int64_t expert_bytes = 0;  // from one expert to the next
  char* half(int which, int64_t e) const { return (which ? up : gate) + e * expert_bytes; }
};

inline GateUp gate_up_view(const Tensor& gate_up, const OptTensor& up, int64_t bytes) {
  GateUp g;
  const int64_t half = gate_up.numel() / gate_up.size(0) * bytes / (up ? 1 : 2);
  g.gate = gate_up.ptr<char>();
  g.up = up ? up->ptr<char>() : g.gate + half;
  g.expert_bytes = up ? half : 2 * half;
  return g;
}

// The layer after its checks: sizes and raw pointers.
struct ExpertLayer {
  DType dtype;
  int64_t bytes;  // of an element
  int64_t T, D, F, E;
  const char* x;
  int64_t x_row_bytes;
  GateUp gate_up;
  char* down;
  const char *gate_up_bias, *down_bias;  // [E, 2F], [E, D] or null
  int activation;                        // 0 silu, 1 gelu, 2 gelu_tanh
  float clamp;                           // infinity: none
};

inline ExpertLayer check_layer(const Check& c, const Tensor& x, const ExpertWeights& w) {
  ExpertLayer l{};
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
  l.activation = static_cast<int>(w.activation);
  l.clamp = w.clamp ? static_cast<float>(*w.clamp) : std::numeric_limits<float>::infinity();
  return l;
}

inline void check_routing_weights(const Check& c, const Tensor& weights, const Tensor& x) {
  c.that(weights.dtype() == aoti_torch_dtype_float32() || weights.dtype() == x.dtype(), "weights",
         dtype_name(weights.dtype()), std::string("float32 or x's dtype, ") + dtype_name(x.dtype()));
  c.same_device("weights", weights, x);
}

// ids and weights [T, K]; returns K
inline int64_t check_routing(const Check& c, const Tensor& ids, const Tensor& weights, const Tensor& x) {
  c.rank("ids", ids, 2);
  const int64_t T = x.size(0), K = ids.size(1);
  c.shape("ids", ids, {T, K});
  c.positive("ids", "K", K);
  c.shape("weights", weights, {T, K});
  c.same_device("ids", ids, x);
  check_routing_weights(c, weights, x);
  c.that(T * K <= INT32_MAX, "ids", std::to_string(T * K) + " routed rows",
         "at most 2147483647, what an int32 indexes");
  c.is_int64("ids", ids);
  return K;
}

// int32 cumulative ends [E] of x's rows; their values are each device's to check
inline void check_ends(const Check& c, const Tensor& offsets, const Tensor& x, int64_t E) {
  c.dtype("offsets", offsets, aoti_torch_dtype_int32());
  c.shape("offsets", offsets, {E});
  c.same_device("offsets", offsets, x);
  c.that(x.size(0) <= INT32_MAX, "x", std::to_string(x.size(0)) + " rows", "at most 2147483647, what an int32 indexes");
}

// grouped_experts' ends [E] and routing weights [T]
inline void check_sorted(const Check& c, const Tensor& ends, const OptTensor& weights, const Tensor& x, int64_t E) {
  check_ends(c, ends, x, E);
  if (weights) c.shape("weights", *weights, {x.size(0)}), check_routing_weights(c, *weights, x);
}

inline void check_end(const Check& c, int64_t e, int64_t end, int64_t before, int64_t rows) {
  c.that(end >= before && end <= rows, "offsets",
         std::to_string(end) + " at " + std::to_string(e) + " after " + std::to_string(before),
         "ends that never fall and stay within " + std::to_string(rows) + " rows");
}

// dy [T, D] and the saved pre-activation, h [rows, 2F] or empty; returns whether it was saved
inline bool check_saved(const Check& c, const ExpertLayer& l, const Tensor& dy, const Tensor& x, const Tensor& h,
                        int64_t rows) {
  c.dtype("dy", dy, x.dtype());
  c.shape("dy", dy, {l.T, l.D});
  c.contiguous("dy", dy);
  if (!h.size(0)) return false;
  c.shape("h", h, {rows, 2 * l.F}), c.contiguous("h", h), c.dtype("h", h, x.dtype());
  return true;
}

// ---- grouped_mm
struct MatrixProblem {
  DType dtype;
  int64_t bytes, R, k, n, E;
  bool k_contiguous;  // w's last stride belongs to k
  int64_t ldw;        // stride of the other of k and n
};

// x [R, k], w [E, k, n] contiguous along either, offsets [E]
inline MatrixProblem check_grouped_mm(const Check& c, const Tensor& x, const Tensor& w, const Tensor& offsets) {
  c.rank("x", x, 2);
  c.rank("w", w, 3);
  const DType dt = c.real("x", x);
  c.dtype("w", w, x.dtype());
  c.same_device("w", w, x);
  MatrixProblem p = {};
  p.dtype = dt, p.bytes = dt == DType::f32 ? 4 : 2;
  p.R = x.size(0), p.k = x.size(1), p.n = w.size(2), p.E = w.size(0);
  c.that(w.size(1) == p.k, "w", "shape " + shape_text(w),
         "[E, " + std::to_string(p.k) + ", n], x has k = " + std::to_string(p.k));
  c.positive("x", "k", p.k);
  c.positive("w", "n", p.n);
  c.positive("w", "E", p.E);
  c.that(x.stride(1) == 1 || p.k == 1, "x", "rows of stride " + std::to_string(x.stride(1)), "rows of stride 1");
  const bool n_contiguous = (w.stride(2) == 1 || p.n == 1) && w.stride(1) >= p.n;
  p.k_contiguous = !n_contiguous;
  p.ldw = n_contiguous ? w.stride(1) : w.stride(2);
  c.that(n_contiguous || ((w.stride(1) == 1 || p.k == 1) && w.stride(2) >= p.k), "w",
         "strides " + std::to_string(w.stride(1)) + ", " + std::to_string(w.stride(2)), "stride 1 along k or along n");
  check_ends(c, offsets, x, p.E);
  return p;
}

// ---- where gradients go
struct WeightGrad {
  bool accumulate = false, fp32 = false;  // otherwise overwritten; in the operands' dtype
};
struct Gradients {    // null: not wanted
  char* x = nullptr;  // [T, D]
  GateUp gate_up;
  WeightGrad gate_up_as;
  char* down = nullptr;
  WeightGrad down_as;
  float* weight = nullptr;
  char *gate_up_bias = nullptr, *down_bias = nullptr;
};

// A gradient buffer of the caller's: fp32 or the weight's dtype.
inline WeightGrad check_main_grad(const Check& c, const char* name, const Tensor& buffer, const Tensor& weight,
                                  bool accumulate) {
  const bool fp32 = buffer.dtype() == aoti_torch_dtype_float32();
  c.that(fp32 || buffer.dtype() == weight.dtype(), name, dtype_name(buffer.dtype()),
         std::string("float32 or the weight's dtype, ") + dtype_name(weight.dtype()));
  bool same = buffer.dim() == 3;
  for (int i = 0; i < 3 && same; i++) same = buffer.size(i) == weight.size(i);
  c.that(same, name, "shape " + shape_text(buffer), "the weight's shape " + shape_text(weight));
  c.same_device(name, buffer, weight);
  c.contiguous(name, buffer);
  return {accumulate, fp32};
}

// The tensors that backward returns, an unwanted one without elements, and the memory its passes write to.
struct BackwardOutputs {
  Tensor x, gate_up, up, down, weights, gate_up_bias, down_bias;
  Gradients to;

  Grads tuple() && {
    return {std::move(x),       std::move(gate_up),      std::move(up),       std::move(down),
            std::move(weights), std::move(gate_up_bias), std::move(down_bias)};
  }
};

// empty(like, sizes, dtype) allocates a weight's gradient; `weights` has the sizes of the routing weights.
template <class Empty, size_t N>
BackwardOutputs backward_outputs(const Check& c, const ExpertLayer& l, const ExpertWeights& w, const Tensor& x,
                                 int64_t needs, const int64_t (&weights)[N], const OptTensor& main_gate_up,
                                 const OptTensor& main_up, const OptTensor& main_down, Empty empty) {
  const int32_t dt = x.dtype(), f32 = aoti_torch_dtype_float32();
  const auto wanted = [&](int64_t bit) { return (needs & bit) != 0; };
  const auto none = [&] { return x.empty({0}, dt); };
  const bool add = !wanted(kOverwrite);
  const bool own_gate_up = wanted(kNeedGateUp) && !main_gate_up, own_down = wanted(kNeedDown) && !main_down;
  Gradients to;
  if (wanted(kNeedGateUp) && main_gate_up) {
    c.that(main_up.has_value() == w.up.has_value(), "main_grads", "another number of buffers", "one buffer a weight");
    to.gate_up_as = check_main_grad(c, "main_grads", *main_gate_up, w.gate_up, add);
    if (w.up)
      check_main_grad(c, "main_grads", *main_up, *w.up, add), c.dtype("main_grads", *main_up, main_gate_up->dtype());
    to.gate_up = gate_up_view(*main_gate_up, main_up, to.gate_up_as.fp32 ? 4 : l.bytes);
  }
  if (wanted(kNeedDown) && main_down) {
    to.down_as = check_main_grad(c, "main_grads", *main_down, w.down, add);
    to.down = main_down->ptr<char>();
  }
  BackwardOutputs o{wanted(kNeedX) ? x.empty({l.T, l.D}, dt) : none(),
                    own_gate_up ? empty(x, {l.E, w.up ? l.F : 2 * l.F, l.D}, dt) : none(),
                    own_gate_up && w.up ? empty(x, {l.E, l.F, l.D}, dt) : none(),
                    own_down ? empty(x, {l.E, l.D, l.F}, dt) : none(),
                    wanted(kNeedWeights) ? x.empty(weights, f32) : x.empty({0}, f32),
                    wanted(kNeedGateUpBias) ? x.empty({l.E, 2 * l.F}, dt) : none(),
                    wanted(kNeedDownBias) ? x.empty({l.E, l.D}, dt) : none(),
                    to};
  if (wanted(kNeedX)) o.to.x = o.x.ptr<char>();
  if (own_gate_up) {
    OptTensor no_up;
    o.to.gate_up = w.up ? GateUp{o.gate_up.ptr<char>(), o.up.ptr<char>(), l.F * l.D * l.bytes}
                        : gate_up_view(o.gate_up, no_up, l.bytes);
  }
  if (own_down) o.to.down = o.down.ptr<char>();
  if (wanted(kNeedWeights)) o.to.weight = o.weights.ptr<float>();
  if (wanted(kNeedGateUpBias)) o.to.gate_up_bias = o.gate_up_bias.ptr<char>();
  if (wanted(kNeedDownBias)) o.to.down_bias = o.down_bias.ptr<char>();
  return o;
}
}  // namespace sail
