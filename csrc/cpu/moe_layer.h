// What forward and backward of the expert layer share: the problem as data, its rows sorted by expert, and its tasks.
// T tokens, D hidden, F expert width, E experts, K top-k, R routed rows (dropped ones left out).
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "../torch/moe.h"
#include "huge.h"
#include "kernels/elements.h"
#include "kernels/experts.h"
#include "kernels/gemm.h"
#include "tasks.h"
#include "workspace.h"

namespace sail::cpu {

// Rows in expert order: expert e owns rows offsets[e] .. offsets[e + 1].
struct RoutedRows {
  std::vector<int32_t> offsets;  // [E + 1]
  std::vector<int32_t> flat;     // [R]: index t * K + k of the row's (token, slot); for sorted rows the row itself
  std::vector<float> weight;     // [R]
  int64_t K = 1;                 // token of a row: flat / K
  int64_t count() const { return offsets.back(); }
};

struct Layer : ExpertLayer {
  int threads;

  const char* x_row(const RoutedRows& rows, int64_t r) const { return x + rows.flat[r] / rows.K * x_row_bytes; }
  const char* bias(int which, int64_t e) const {
    return gate_up_bias ? gate_up_bias + (e * 2 + which) * F * bytes : nullptr;
  }
};

// One expert's rows m0 .. m1 against columns n0 .. n1; `kind` is the caller's.
struct Task {
  int kind;
  int32_t e;
  int64_t m0, m1, n0, n1;
};

// Rows of a block whose operand of `row_bytes` a row stays in half the second-level cache (1 MB on Zen 4).
inline int64_t block_rows(int64_t row_bytes) { return std::clamp<int64_t>((512 << 10) / row_bytes, 16, kOuterRows); }

// ---- weight gradients, shared with grouped_mm
// Bytes for the packed operands of one task of M outputs times N: all of them where they are few, at most 1.5 MB of
// them at a time where they are many.
inline int64_t packed_bytes(int64_t R, int64_t M, int64_t N) {
  return std::max(wgrad_scratch(R, M), std::min<int64_t>(1536 << 10, (R + 1) * (M + N + 128) * 4));
}
// Pointers to the R rows of two operands.
inline int64_t row_table_bytes(int64_t R) { return (2 * R * static_cast<int64_t>(sizeof(void*)) + 63) / 64 * 64; }
inline int64_t wgrad_scratch(int64_t R, int64_t M, int64_t N) { return row_table_bytes(R) + packed_bytes(R, M, N); }

// Outputs a task: few enough that its packed columns stay below 1 MB, however many rows the expert has.
inline int64_t wgrad_rows(int64_t R) { return std::clamp<int64_t>((1 << 20) / (4 * (R + 1)) - 64, 12, 384); }

// out[m] (+)= sum over r < R of a_row(r)[m0 + m] * b_row(r)[:], m < M; an expert without rows has an exact zero gradient.
template <class A, class B>
void wgrad_block(DType dtype, bool fp32, int64_t R, A&& a_row, B&& b_row, int64_t m0, int64_t M, int64_t N, char* out,
                 Output mode, char* scratch) {
  if (R == 0) {
    if (mode == Output::overwrite) std::fill(out, out + M * N * (fp32 || dtype == DType::f32 ? 4 : 2), 0);
    return;
  }
  const void** a_rows = reinterpret_cast<const void**>(scratch);
  const void** b_rows = a_rows + R;
  for (int64_t r = 0; r < R; r++) a_rows[r] = a_row(r), b_rows[r] = b_row(r);
  const auto& table = fp32 ? gemm_kernels().wgrad_gemm_f32 : gemm_kernels().wgrad_gemm;
  table[static_cast<int>(dtype)]({.a_rows = a_rows,
                                  .b_rows = b_rows,
                                  .R = R,
                                  .m0 = m0,
                                  .M = M,
                                  .N = N,
                                  .out = out,
                                  .ldo = N,
                                  .mode = mode,
                                  .scratch = scratch + row_table_bytes(R),
                                  .scratch_bytes = packed_bytes(R, M, N)});
}

// int32 cumulative ends [E] as offsets [E + 1]
inline std::vector<int32_t> read_offsets(const Check& c, const Tensor& offsets, const Tensor& x, int64_t E) {
  std::vector<int32_t> all(1, 0);
  for (int64_t e = 0; e < E; e++) {
    const int32_t end = offsets.ptr<const int32_t>()[e * offsets.stride(0)];
    check_end(c, e, end, all.back(), x.size(0));
    all.push_back(end);
  }
  return all;
}
}  // namespace sail::cpu
