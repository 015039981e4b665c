// Backward of the expert layer, in two passes over the experts:
//   1  dA = dY . down, and from it and the pre-activation: dH, the weighted activation, the routing weights' gradient
//   2  dX = dH . gate_up,  dgate_up = dH^T . X,  ddown = dY^T . (weight * A), and the biases' column sums
// Expert outputs are neither stored nor computed again. Pass 2 mixes tasks bound by arithmetic with tasks bound by
// memory.
#include "moe.h"

namespace sail::cpu {
namespace {
constexpr int64_t kActivationColumns = 64;  // of h computed again at a time
constexpr int64_t kBlockColumns = 1024;     // of fp32 results kept in the second-level cache
enum Kind { kDx, kDgate, kDup, kDdown, kBias };

struct Pass {
  const Layer& l;
  const RoutedRows& rows;
  const char *dy, *h;
  const Gradients& g;
  bool sorted;
  int dt = static_cast<int>(l.dtype);
  int64_t splits = (l.F + kBlockColumns - 1) / kBlockColumns;
  Buffer dh{rows.count() * 2 * l.F * l.bytes};      // [R, 2F]
  Buffer a_weighted{rows.count() * l.F * l.bytes};  // [R, F]
  Buffer dx_buffer{g.x && !sorted ? rows.count() * l.D * l.bytes : 0};
  char* dx_rows = sorted ? g.x : dx_buffer.get();                      // [R, D]
  std::vector<float> dot = std::vector<float>(rows.count() * splits);  // [splits, R]

  char* dh_row(int64_t r, int which) const { return dh.get() + (r * 2 + which) * l.F * l.bytes; }
  const char* dy_row(int64_t r) const { return dy + rows.flat[r] / rows.K * l.D * l.bytes; }

  void activations(const Task& t, char* scratch) const;
  void dx(const Task& t, char* scratch) const;
  void wgrad(const Task& t, char* scratch) const;
  void biases(const Task& t, char* scratch) const;
};

// scratch: dA [M, columns] fp32, outer_gemm's own, and for a forgotten pre-activation one block of h and its products
int64_t activation_scratch(const Layer& l) {
  const int64_t columns = std::min(l.F, kBlockColumns);
  return kOuterRows * columns * 4 + kOuterScratch + kOuterRows * kActivationColumns * 2 * 4 +
         kOuterRows * 2 * l.F * l.bytes;
}

void Pass::activations(const Task& t, char* scratch) const {
  const int64_t M = t.m1 - t.m0, n = t.n1 - t.n0;
  float* da = reinterpret_cast<float*>(scratch);
  char* outer = scratch + kOuterRows * std::min(l.F, kBlockColumns) * 4;
  const void* dy_rows[kOuterRows];
  for (int64_t m = 0; m < M; m++) dy_rows[m] = dy_row(t.m0 + m);
  const char* down = l.down + (t.e * l.D * l.F + t.n0) * l.bytes;
  gemm_kernels().outer_gemm[dt]({.a_rows = dy_rows,
                                 .b = down,
                                 .ldb = l.F,
                                 .M = M,
                                 .N = n,
                                 .K = l.D,
                                 .c = da,
                                 .ldc = n,
                                 .accumulate = false,
                                 .scratch = outer});

  const char* h_rows = h ? h + t.m0 * 2 * l.F * l.bytes : nullptr;
  if (!h) {
    float* products = reinterpret_cast<float*>(outer + kOuterScratch);
    char* again = reinterpret_cast<char*>(products + 2 * kOuterRows * kActivationColumns);
    for_pieces(t.n0, t.n1, kActivationColumns, [&](int64_t c0, int64_t c1) {
      up_block(l, rows, {0, t.e, t.m0, t.m1, c0, c1}, products, again, nullptr);
    });
    h_rows = again;
  }
  float* dots = const_cast<float*>(dot.data()) + t.n0 / kBlockColumns * rows.count() + t.m0;
  const int64_t at = t.n0 * l.bytes;
  expert_kernels().gated_backward[dt]({.da = da,
                                       .ld = n,
                                       .M = M,
                                       .n = n,
                                       .h_gate = h_rows + at,
                                       .h_up = h_rows + l.F * l.bytes + at,
                                       .ldh = 2 * l.F,
                                       .activation = static_cast<Activation>(l.activation),
                                       .clamp = l.clamp,
                                       .weight = rows.weight.data() + t.m0,
                                       .dh_gate = dh_row(t.m0, 0) + at,
                                       .dh_up = dh_row(t.m0, 1) + at,
                                       .lddh = 2 * l.F,
                                       .a_weighted = a_weighted.get() + (t.m0 * l.F + t.n0) * l.bytes,
                                       .lda = l.F,
                                       .dot = dots});
}

void Pass::dx(const Task& t, char* scratch) const {
  const int64_t M = t.m1 - t.m0, n = t.n1 - t.n0;
  float* c = reinterpret_cast<float*>(scratch);
  for (int which = 0; which < 2; which++) {
    const void* dh_rows[kOuterRows];
    for (int64_t m = 0; m < M; m++) dh_rows[m] = dh_row(t.m0 + m, which);
    const char* weight = l.gate_up.half(which, t.e) + t.n0 * l.bytes;
    gemm_kernels().outer_gemm[dt]({.a_rows = dh_rows,
                                   .b = weight,
                                   .ldb = l.D,
                                   .M = M,
                                   .N = n,
                                   .K = l.F,
                                   .c = c,
                                   .ldc = n,
                                   .accumulate = which == 1,
                                   .scratch = scratch + kOuterRows * kBlockColumns * 4});
  }
  expert_kernels().store_rows[dt]({.c = c,
                                   .ldc = n,
                                   .M = M,
                                   .n = n,
                                   .bias = nullptr,
                                   .weight = nullptr,
                                   .out = dx_rows + (t.m0 * l.D + t.n0) * l.bytes,
                                   .ldo = l.D});
}

// dgate, dup: O[F, D] = dH^T . X;  ddown: O[D, F] = dY^T . (weight * A). m0 .. m1 are rows of O.
void Pass::wgrad(const Task& t, char* scratch) const {
  const int64_t r0 = rows.offsets[t.e], R = rows.offsets[t.e + 1] - r0, M = t.m1 - t.m0;
  const bool down = t.kind == kDdown;
  const int64_t N = down ? l.F : l.D;
  const WeightGrad& as = down ? g.down_as : g.gate_up_as;
  const int64_t out_bytes = as.fp32 ? 4 : l.bytes;
  char* out =
      (down ? g.down + t.e * l.D * l.F * out_bytes : g.gate_up.half(t.kind == kDup, t.e)) + t.m0 * N * out_bytes;
  wgrad_block(
      l.dtype, as.fp32, R,
      [&](int64_t r) -> const void* { return down ? dy_row(r0 + r) : dh_row(r0 + r, t.kind == kDup); },
      [&](int64_t r) -> const void* {
        return down ? a_weighted.get() + (r0 + r) * l.F * l.bytes : l.x_row(rows, r0 + r);
      },
      t.m0, M, N, out, as.accumulate ? Output::accumulate : Output::overwrite, scratch);
}

void Pass::biases(const Task& t, char* scratch) const {
  const int64_t r0 = rows.offsets[t.e], R = rows.offsets[t.e + 1] - r0;
  const auto sum = expert_kernels().combine[dt];
  const void** from = reinterpret_cast<const void**>(scratch);
  if (g.gate_up_bias) {
    for (int64_t r = 0; r < R; r++) from[r] = dh_row(r0 + r, 0);
    sum(from, nullptr, R, g.gate_up_bias + t.e * 2 * l.F * l.bytes, 2 * l.F);
  }
  if (g.down_bias) {
    for (int64_t r = 0; r < R; r++) from[r] = dy_row(r0 + r);
    sum(from, rows.weight.data() + r0, R, g.down_bias + t.e * l.D * l.bytes, l.D);
  }
}

std::vector<Task> second_tasks(const Pass& p) {
  const Layer& l = p.l;
  std::vector<Task> tasks;
  for (int32_t e = 0; e < l.E; e++) {
    const int64_t r0 = p.rows.offsets[e], r1 = p.rows.offsets[e + 1], most = wgrad_rows(r1 - r0);
    if (p.g.x)
      for_pieces(0, l.D, kBlockColumns, [&](int64_t n0, int64_t n1) {
        for_pieces(r0, r1, kOuterRows, [&](int64_t m0, int64_t m1) { tasks.push_back({kDx, e, m0, m1, n0, n1}); });
      });
    for (int kind : {kDgate, kDup})
      if (p.g.gate_up.gate)
        for_pieces(0, l.F, most, [&](int64_t m0, int64_t m1) { tasks.push_back({kind, e, m0, m1, 0, 0}); });
    if (p.g.down) for_pieces(0, l.D, most, [&](int64_t m0, int64_t m1) { tasks.push_back({kDdown, e, m0, m1, 0, 0}); });
    if (p.g.gate_up_bias || p.g.down_bias) tasks.push_back({kBias, e, 0, 0, 0, 0});
  }
  return tasks;
}

int64_t second_scratch(const Pass& p) {
  int64_t most = p.g.x ? kOuterRows * kBlockColumns * 4 + kOuterScratch : 0;
  for (int64_t e = 0; e < p.l.E; e++) {
    const int64_t R = p.rows.offsets[e + 1] - p.rows.offsets[e];
    const bool weights = p.g.down || p.g.gate_up.gate;
    most = std::max(most, weights ? wgrad_scratch(R, wgrad_rows(R), std::max(p.l.D, p.l.F)) : row_table_bytes(R));
  }
  return most;
}
}  // namespace

void experts_backward(const Layer& l, const RoutedRows& rows, bool sorted, const char* dy, const char* h,
                      const Gradients& g) {
  Pass p{l, rows, dy, h, g, sorted};
  std::vector<Task> first;
  for (int32_t e = 0; e < l.E; e++)
    for (int64_t n0 = 0; n0 < l.F; n0 += kBlockColumns)
      for_pieces(rows.offsets[e], rows.offsets[e + 1], kOuterRows, [&](int64_t m0, int64_t m1) {
        first.push_back({0, e, m0, m1, n0, std::min(n0 + kBlockColumns, l.F)});
      });
  run_tasks(first, l.threads, activation_scratch(l), [&](const Task& t, char* scratch) { p.activations(t, scratch); });

  run_tasks(second_tasks(p), l.threads, second_scratch(p), [&](const Task& t, char* scratch) {
    if (t.kind == kDx)
      p.dx(t, scratch);
    else if (t.kind == kBias)
      p.biases(t, scratch);
    else
      p.wgrad(t, scratch);
  });

  const int64_t R = rows.count();
  if (g.x && !sorted) combine_tokens(l, rows, p.dx_rows, false, g.x);
  if (g.x && sorted) std::fill(g.x + R * l.D * l.bytes, g.x + l.T * l.D * l.bytes, 0);  // tail rows
  if (g.weight)
    for (int64_t r = 0; r < R; r++) {
      float d = 0;
      for (int64_t s = 0; s < p.splits; s++) d += p.dot[s * R + r];
      const int64_t e = std::upper_bound(rows.offsets.begin(), rows.offsets.end(), r) - rows.offsets.begin() - 1;
      if (l.down_bias) d += expert_kernels().row_dot[p.dt](p.dy_row(r), l.down_bias + e * l.D * l.bytes, l.D);
      g.weight[r] = d;
    }
}
}  // namespace sail::cpu
