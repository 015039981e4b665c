// Forward and backward of the expert layer as a list of grouped products and what lies between them.
//   forward   a = act(x . gate^T) * (x . up^T), keeping the pre-activation h where it is wanted;  y = sum_k w a . down^T
//   backward  dA = dy . down, and from it and h: dh, the weighted a, the routing weights' gradient
//             ddown = dy^T . (w a),  dgate_up = dh^T . x,  dx = sum_k dh . gate_up
// Expert outputs are neither saved nor computed again. Buffers come in the order that keeps their sum below
// 2 D K + 6 F K bytes a token: a buffer goes back as soon as what follows in the stream no longer reads it.
#include <algorithm>

#include "kernels/combine.cuh"
#include "moe.h"

namespace sail::cuda {
namespace {
constexpr int kThreads = 256;

// the 16-bit half of `dispatch`
template <class F> void dispatch_half(DType dtype, bool vectors, F f) {
  if (dtype == DType::bf16) return vectors ? f(__nv_bfloat16{}, Width<8>{}) : f(__nv_bfloat16{}, Width<1>{});
  return vectors ? f(__half{}, Width<8>{}) : f(__half{}, Width<1>{});
}

int threads_for(int64_t columns, int width) {
  return static_cast<int>(std::clamp<int64_t>((columns + width * 32 - 1) / (width * 32), 1, kThreads / 32) * 32);
}

Rows gathered(const void* data, int64_t stride, const RowMap& rows) { return {data, stride, rows.token}; }
Rows in_order(const void* data, int64_t stride) { return {data, stride, nullptr}; }

// [E, 2F, D]
template <class Pointer> Stacked<Pointer> stacked(const GateUp& g, const ExpertLayer& l, int64_t element) {
  return {g.gate, g.up, g.expert_bytes / element, l.D, l.F};
}
// [E, D, F]
template <class Pointer> Stacked<Pointer> single(Pointer down, const ExpertLayer& l) {
  return {down, nullptr, l.D * l.F, l.F, l.D};
}

RowsProblem rows_problem(const ExpertLayer& l, const RowMap& rows, const Rows& a, const Stacked<const void*>& b,
                         Layout layout) {
  RowsProblem p = {};
  p.a = a, p.b = b, p.layout = layout, p.offsets = rows.offsets, p.R = rows.R, p.E = l.E;
  return p;
}

// h and a, either null; the routed rows' pre-activation and activation
void up_projection(const Call& call, const ExpertLayer& l, const RowMap& rows, void* h, void* a) {
  if (!rows.R) return;
  RowsProblem p = rows_problem(l, rows, gathered(l.x, l.x_row_bytes / l.bytes, rows),
                               stacked<const void*>(l.gate_up, l, l.bytes), Layout::nk);
  p.N = l.F, p.K = l.D;
  const GatedForward out = {l.gate_up_bias, h, a, static_cast<Activation>(l.activation), l.clamp};
  grouped_gemm(call.card, p, out, call.launch(l.dtype));
}

void combine(const Call& call, const ExpertLayer& l, const RowMap& rows, const void* from, const float* weight,
             void* out) {
  if (!l.T) return;
  Combine a = {};
  a.rows = from, a.row_of = rows.row_of, a.weight = weight, a.out = out;
  a.D = l.D, a.K = static_cast<int32_t>(rows.K);
  dispatch_half(l.dtype, aligned(l.bytes, {from, out}, {l.D}), [&](auto t, auto width) {
    using T = decltype(t);
    constexpr int N = decltype(width)::value;
    launch(combine_kernel<T, N>, l.T, threads_for(l.D, N), 0, call.stream, a);
  });
}

// out[e] = sum of the expert's rows of `in`, gathered through `index`
void expert_sums(const Call& call, const ExpertLayer& l, const RowMap& rows, const void* in, const int32_t* index,
                 const float* weight, int64_t columns, void* out) {
  ExpertSum a = {};
  a.in = in, a.index = index, a.weight = weight, a.offsets = rows.offsets, a.out = out;
  a.columns = a.stride = columns;
  dispatch_half(l.dtype, aligned(l.bytes, {in, out}, {columns}), [&](auto t, auto width) {
    using T = decltype(t);
    constexpr int N = decltype(width)::value;
    const int64_t blocks = (columns + kExpertSumLanes * N - 1) / (kExpertSumLanes * N);
    launch(expert_sum_kernel<T, N>, Grid(blocks, static_cast<unsigned>(l.E)), dim3(kExpertSumLanes, kExpertSumGroups),
           0, call.stream, a);
  });
}

void routing_gradient(const Call& call, const ExpertLayer& l, const RowMap& rows, const float* dot, const void* dy,
                      float* out) {
  const int64_t count = rows.sorted() ? l.T : l.T * rows.K;
  if (!count) return;
  RoutingGradient a = {};
  a.partial = dot, a.row_of = rows.row_of, a.offsets = rows.offsets, a.dy = dy, a.bias = l.down_bias, a.out = out;
  a.count = count, a.R = rows.R, a.D = l.D, a.E = static_cast<int32_t>(l.E), a.K = static_cast<int32_t>(rows.K);
  a.tiles = static_cast<int32_t>((l.F + kDotColumns - 1) / kDotColumns);
  const int64_t blocks = (count * 32 + kThreads - 1) / kThreads;
  const auto kernel = l.dtype == DType::bf16 ? routing_gradient_kernel<__nv_bfloat16> : routing_gradient_kernel<__half>;
  launch(kernel, blocks, kThreads, 0, call.stream, a);
}

// dh [R, 2F] and the weighted activation [R, F], either null, and the routing weights' gradient
void activation_gradients(const Call& call, const ExpertLayer& l, const RowMap& rows, const void* dy, const void* h,
                          void* dh, void* a_weighted, float* dweights) {
  const int64_t tiles = (l.F + kDotColumns - 1) / kDotColumns;
  const Tensor dot = call.floats(dweights ? tiles * rows.R : 0);
  if (rows.R) {
    RowsProblem p = rows_problem(l, rows, gathered(dy, l.D, rows), single<const void*>(l.down, l), Layout::kn);
    p.N = l.F, p.K = l.D;
    GatedBackward out = {};
    out.h = h, out.weight = rows.weight, out.dh = dh, out.a_weighted = a_weighted;
    out.dot = dweights ? dot.ptr<float>() : nullptr;
    out.activation = static_cast<Activation>(l.activation), out.clamp = l.clamp;
    grouped_gemm(call.card, p, out, call.launch(l.dtype));
  }
  if (dweights) routing_gradient(call, l, rows, dot.ptr<const float>(), dy, dweights);
}

void weight_gradient(const Call& call, const ExpertLayer& l, const RowMap& rows, const Rows& a, const Rows& b,
                     int64_t M, int64_t N, const Stacked<void*>& out, const WeightGrad& as) {
  WgradProblem p = {};
  p.a = a, p.b = b, p.offsets = rows.offsets, p.R = rows.R, p.E = l.E, p.M = M, p.N = N;
  grouped_gemm(call.card, p, StoreGrad{out, as.fp32, as.accumulate}, call.launch(l.dtype));
}

void input_gradient(const Call& call, const ExpertLayer& l, const RowMap& rows, const void* dh, void* dx) {
  Tensor by_row = call.buffer(rows.sorted() ? 0 : rows.R, l.D);
  void* out = rows.sorted() ? dx : by_row.data();
  if (rows.R) {
    RowsProblem p =
        rows_problem(l, rows, in_order(dh, 2 * l.F), stacked<const void*>(l.gate_up, l, l.bytes), Layout::kn);
    p.N = l.D, p.K = 2 * l.F, p.zero_tail = rows.sorted();
    grouped_gemm(call.card, p, StoreRows{out, l.D, nullptr, nullptr}, call.launch(l.dtype));
  }
  if (!rows.sorted()) combine(call, l, rows, out, nullptr, dx);
}
}  // namespace

void experts_forward(const Call& call, const ExpertLayer& l, const RowMap& rows, void* h, void* y) {
  const Tensor a = call.buffer(rows.R, l.F), by_row = call.buffer(rows.sorted() ? 0 : rows.R, l.D);
  up_projection(call, l, rows, h, a.data());
  // a sorted row is its token's only one, so it is weighted before it is rounded
  const StoreRows out = {rows.sorted() ? y : by_row.data(), l.D, l.down_bias, rows.sorted() ? rows.weight : nullptr};
  RowsProblem p = rows_problem(l, rows, in_order(a.data(), l.F), single<const void*>(l.down, l), Layout::nk);
  p.N = l.D, p.K = l.F, p.zero_tail = rows.sorted();
  if (rows.R) grouped_gemm(call.card, p, out, call.launch(l.dtype));
  if (!rows.sorted()) combine(call, l, rows, by_row.data(), rows.weight, y);
}

void experts_backward(const Call& call, const ExpertLayer& l, const RowMap& rows, const void* dy, const void* h,
                      const Gradients& g) {
  const bool need_dh = g.x || g.gate_up.gate || g.gate_up_bias;
  const Rows x_rows = gathered(l.x, l.x_row_bytes / l.bytes, rows), dy_rows = gathered(dy, l.D, rows);
  // a pre-activation that is computed again becomes its own gradient in place: every element is read and then written
  // by one tile
  const Tensor dh = call.buffer(need_dh || !h ? rows.R : 0, 2 * l.F);
  {
    const Tensor a_weighted = call.buffer(g.down ? rows.R : 0, l.F);
    if (need_dh || g.down || g.weight) {
      if (!h) up_projection(call, l, rows, dh.data(), nullptr);
      activation_gradients(call, l, rows, dy, h ? h : dh.data(), need_dh ? dh.data() : nullptr,
                           g.down ? a_weighted.data() : nullptr, g.weight);
    }
    if (g.down)
      weight_gradient(call, l, rows, dy_rows, in_order(a_weighted.data(), l.F), l.D, l.F, single<void*>(g.down, l),
                      g.down_as);
  }
  if (g.gate_up.gate) {
    const int64_t element = g.gate_up_as.fp32 ? 4 : l.bytes;
    weight_gradient(call, l, rows, in_order(dh.data(), 2 * l.F), x_rows, 2 * l.F, l.D,
                    stacked<void*>(g.gate_up, l, element), g.gate_up_as);
  }
  if (g.gate_up_bias) expert_sums(call, l, rows, dh.data(), nullptr, nullptr, 2 * l.F, g.gate_up_bias);
  if (g.down_bias) expert_sums(call, l, rows, dy, rows.token, rows.weight, l.D, g.down_bias);
  if (g.x) input_gradient(call, l, rows, dh.data(), g.x);
}
}  // namespace sail::cuda
