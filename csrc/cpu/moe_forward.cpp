// Forward of the expert layer: up-projection with gated activation, down-projection, weighted combine.
#include "moe.h"

namespace sail::cpu {
namespace {
constexpr int64_t kUpColumns = 64;     // a task's gate and up rows, 4 KB each at D = 2048: 0.5 MB of weights
constexpr int64_t kDownColumns = 128;  // likewise of down

// a = act(x . gate^T) * (x . up^T), keeping the pre-activation in h where it is wanted
void up_projection(const Layer& l, const RoutedRows& rows, char* h, char* a) {
  std::vector<Task> tasks;
  for (int32_t e = 0; e < l.E; e++)
    for_pieces(0, l.F, kUpColumns, [&](int64_t n0, int64_t n1) {
      for_pieces(rows.offsets[e], rows.offsets[e + 1], block_rows(l.D * l.bytes),
                 [&](int64_t m0, int64_t m1) { tasks.push_back({0, e, m0, m1, n0, n1}); });
    });
  const int64_t half = kOuterRows * kUpColumns;
  run_tasks(tasks, l.threads, 2 * half * 4, [&](const Task& t, char* scratch) {
    up_block(l, rows, t, reinterpret_cast<float*>(scratch), h ? h + t.m0 * 2 * l.F * l.bytes : nullptr,
             a + (t.m0 * l.F + t.n0) * l.bytes);
  });
}

// y[r] = a[r] . down^T + bias, times the row's weight where `weighted`
void down_projection(const Layer& l, const RoutedRows& rows, const char* a, bool weighted, char* y) {
  std::vector<Task> tasks;
  for (int32_t e = 0; e < l.E; e++)
    for_pieces(0, l.D, kDownColumns, [&](int64_t n0, int64_t n1) {
      for_pieces(rows.offsets[e], rows.offsets[e + 1], block_rows(l.F * l.bytes),
                 [&](int64_t m0, int64_t m1) { tasks.push_back({0, e, m0, m1, n0, n1}); });
    });
  const int dt = static_cast<int>(l.dtype);
  run_tasks(tasks, l.threads, kOuterRows * kDownColumns * 4, [&](const Task& t, char* scratch) {
    const void* a_rows[kOuterRows];
    const int64_t M = t.m1 - t.m0, n = t.n1 - t.n0;
    for (int64_t m = 0; m < M; m++) a_rows[m] = a + (t.m0 + m) * l.F * l.bytes;
    float* c = reinterpret_cast<float*>(scratch);
    const char* weight = l.down + (t.e * l.D + t.n0) * l.F * l.bytes;
    gemm_kernels().dot_gemm[dt]({.a_rows = a_rows,
                                 .b = weight,
                                 .ldb = l.F,
                                 .M = M,
                                 .N = n,
                                 .K = l.F,
                                 .c = c,
                                 .ldc = n,
                                 .accumulate = false,
                                 .scratch = nullptr});
    const char* bias = l.down_bias ? l.down_bias + (t.e * l.D + t.n0) * l.bytes : nullptr;
    const float* row_weight = weighted ? rows.weight.data() + t.m0 : nullptr;
    expert_kernels().store_rows[dt]({.c = c,
                                     .ldc = n,
                                     .M = M,
                                     .n = n,
                                     .bias = bias,
                                     .weight = row_weight,
                                     .out = y + (t.m0 * l.D + t.n0) * l.bytes,
                                     .ldo = l.D});
  });
}

// [T * K]: the row of a (token, slot), -1 where it is dropped
std::vector<int32_t> inverse(const Layer& l, const RoutedRows& rows) {
  std::vector<int32_t> row_of(l.T * rows.K, -1);
  for (int64_t r = 0; r < rows.count(); r++) row_of[rows.flat[r]] = static_cast<int32_t>(r);
  return row_of;
}
}  // namespace

void up_block(const Layer& l, const RoutedRows& rows, const Task& t, float* scratch, char* h, char* a) {
  const int dt = static_cast<int>(l.dtype);
  const int64_t M = t.m1 - t.m0, n = t.n1 - t.n0;
  const void* x_rows[kOuterRows];
  for (int64_t m = 0; m < M; m++) x_rows[m] = l.x_row(rows, t.m0 + m);
  float* c[2] = {scratch, scratch + M * n};
  const char* bias[2] = {l.bias(0, t.e), l.bias(1, t.e)};
  for (int which = 0; which < 2; which++) {
    const char* weight = l.gate_up.half(which, t.e) + t.n0 * l.D * l.bytes;
    gemm_kernels().dot_gemm[dt]({.a_rows = x_rows,
                                 .b = weight,
                                 .ldb = l.D,
                                 .M = M,
                                 .N = n,
                                 .K = l.D,
                                 .c = c[which],
                                 .ldc = n,
                                 .accumulate = false,
                                 .scratch = nullptr});
    if (bias[which]) bias[which] += t.n0 * l.bytes;
  }
  char* h_gate = h ? h + t.n0 * l.bytes : nullptr;
  char* h_up = h ? h + (l.F + t.n0) * l.bytes : nullptr;
  expert_kernels().gated_forward[dt]({.gate = c[0],
                                      .up = c[1],
                                      .ld = n,
                                      .M = M,
                                      .n = n,
                                      .gate_bias = bias[0],
                                      .up_bias = bias[1],
                                      .activation = static_cast<Activation>(l.activation),
                                      .clamp = l.clamp,
                                      .h_gate = h_gate,
                                      .h_up = h_up,
                                      .ldh = 2 * l.F,
                                      .a = a,
                                      .lda = l.F});
}

void combine_tokens(const Layer& l, const RoutedRows& rows, const char* per_row, bool weighted, char* out) {
  const std::vector<int32_t> row_of = inverse(l, rows);
  const int64_t K = rows.K;
  const auto kernel = expert_kernels().combine[static_cast<int>(l.dtype)];
#pragma omp parallel for num_threads(l.threads) if (l.T * l.D > 32768)
  for (int64_t t = 0; t < l.T; t++) {
    constexpr int64_t kMost = 64;  // rows added at once; K is rarely above 16
    const void* from[kMost];
    float weight[kMost];
    int64_t n = 0, k = 0;
    char* y = out + t * l.D * l.bytes;
    for (bool more = true; more;) {
      for (; k < K && n < kMost; k++) {
        const int32_t r = row_of[t * K + k];
        if (r < 0) continue;
        from[n] = per_row + r * l.D * l.bytes;
        weight[n++] = weighted ? rows.weight[r] : 1.f;
      }
      more = k < K;
      kernel(from, weight, n, y, l.D);
      from[0] = y, weight[0] = 1.f, n = 1;
    }
  }
}

void experts_forward(const Layer& l, const RoutedRows& rows, bool sorted, char* h, char* y) {
  const int64_t R = rows.count();
  const Buffer a(R * l.F * l.bytes);
  up_projection(l, rows, h, a.get());
  if (sorted) {
    down_projection(l, rows, a.get(), true, y);
    std::fill(y + R * l.D * l.bytes, y + l.T * l.D * l.bytes, 0);  // tail rows
    return;
  }
  const Buffer y_rows(R * l.D * l.bytes);
  down_projection(l, rows, a.get(), false, y_rows.get());
  combine_tokens(l, rows, y_rows.get(), true, y);
}
}  // namespace sail::cpu
