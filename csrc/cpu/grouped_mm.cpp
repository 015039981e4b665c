// Bare grouped GEMM on the CPU: y[r] = x[r] @ w[e] for the rows of expert e. A weight [E, k, n] may be contiguous along
// n or, as the transposed view of an [E, n, k] parameter, along k; neither is copied.
#include <tuple>

#include "moe_layer.h"

namespace sail::cpu {
namespace {
constexpr int64_t kColumns = 1024;  // of fp32 results kept in the second-level cache

struct Problem : MatrixProblem {
  const Tensor &x, &w;
  std::vector<int32_t> offsets;  // [E + 1]

  const char* x_row(int64_t r) const { return x.ptr<const char>() + r * x.stride(0) * bytes; }
  const char* weight(int64_t e) const { return w.ptr<const char>() + e * w.stride(0) * bytes; }
};

Problem check_problem(const Check& c, const Tensor& x, const Tensor& w, const Tensor& offsets) {
  const MatrixProblem p = check_grouped_mm(c, x, w, offsets);
  return {p, x, w, read_offsets(c, offsets, x, p.E)};
}

std::vector<Task> row_tasks(const Problem& p, int64_t columns, int64_t row_bytes) {
  std::vector<Task> tasks;
  for (int32_t e = 0; e < p.E; e++)
    for_pieces(0, columns, kColumns, [&](int64_t n0, int64_t n1) {
      for_pieces(p.offsets[e], p.offsets[e + 1], block_rows(row_bytes),
                 [&](int64_t m0, int64_t m1) { tasks.push_back({0, e, m0, m1, n0, n1}); });
    });
  return tasks;
}

// out[r] = a[r] . B, B = w's expert read as [k, n] (`transposed` false) or as [n, k]; out has `columns` of them
void multiply(const Problem& p, const char* a, int64_t a_row_bytes, int64_t depth, int64_t columns, bool transposed,
              char* out) {
  const int dt = static_cast<int>(p.dtype);
  const bool dot = p.k_contiguous != transposed;  // the weight is contiguous along the sum
  run_tasks(row_tasks(p, columns, depth * p.bytes), num_threads(), kOuterRows * kColumns * 4 + kOuterScratch,
            [&](const Task& t, char* scratch) {
              const void* rows[kOuterRows];
              const int64_t M = t.m1 - t.m0, n = t.n1 - t.n0;
              for (int64_t m = 0; m < M; m++) rows[m] = a + (t.m0 + m) * a_row_bytes;
              float* c = reinterpret_cast<float*>(scratch);
              const char* b = p.weight(t.e) + t.n0 * (dot ? p.ldw : 1) * p.bytes;
              const GemmBlock g{.a_rows = rows,
                                .b = b,
                                .ldb = p.ldw,
                                .M = M,
                                .N = n,
                                .K = depth,
                                .c = c,
                                .ldc = n,
                                .accumulate = false,
                                .scratch = scratch + kOuterRows * kColumns * 4};
              dot ? gemm_kernels().dot_gemm[dt](g) : gemm_kernels().outer_gemm[dt](g);
              expert_kernels().store_rows[dt]({.c = c,
                                               .ldc = n,
                                               .M = M,
                                               .n = n,
                                               .bias = nullptr,
                                               .weight = nullptr,
                                               .out = out + (t.m0 * columns + t.n0) * p.bytes,
                                               .ldo = columns});
            });
  std::fill(out + p.offsets[p.E] * columns * p.bytes, out + p.R * columns * p.bytes, 0);  // tail rows
}

// dw[e] = x^T . dy over the expert's rows, laid out as w is
void weight_gradient(const Problem& p, const char* dy, char* dw) {
  const int64_t rows = p.k_contiguous ? p.n : p.k, columns = p.k_contiguous ? p.k : p.n;
  std::vector<Task> tasks;
  int64_t scratch_bytes = 0;
  for (int32_t e = 0; e < p.E; e++) {
    const int64_t R = p.offsets[e + 1] - p.offsets[e], most = wgrad_rows(R);
    scratch_bytes = std::max(scratch_bytes, wgrad_scratch(R, most, columns));
    for_pieces(0, rows, most, [&](int64_t m0, int64_t m1) { tasks.push_back({0, e, m0, m1, 0, columns}); });
  }
  run_tasks(tasks, num_threads(), scratch_bytes, [&](const Task& t, char* scratch) {
    const int64_t r0 = p.offsets[t.e], R = p.offsets[t.e + 1] - r0;
    const auto x_row = [&](int64_t r) -> const void* { return p.x_row(r0 + r); };
    const auto dy_row = [&](int64_t r) -> const void* { return dy + (r0 + r) * p.n * p.bytes; };
    char* out = dw + (t.e * rows + t.m0) * columns * p.bytes;
    const auto block = [&](const auto& a, const auto& b) {
      wgrad_block(p.dtype, false, R, a, b, t.m0, t.m1 - t.m0, columns, out, Output::overwrite, scratch);
    };
    p.k_contiguous ? block(dy_row, x_row) : block(x_row, dy_row);
  });
}

Tensor grouped_mm(const Tensor& x, const Tensor& w, const Tensor& offsets) {
  const Problem p = check_problem(Check("grouped_mm"), x, w, offsets);
  Tensor y = x.empty({p.R, p.n}, x.dtype());
  multiply(p, x.ptr<const char>(), x.stride(0) * p.bytes, p.k, p.n, false, y.ptr<char>());
  return y;
}

std::tuple<Tensor, Tensor> grouped_mm_backward(const Tensor& dy, const Tensor& x, const Tensor& w,
                                               const Tensor& offsets, bool need_x, bool need_w) {
  const Check c("grouped_mm_backward");
  const Problem p = check_problem(c, x, w, offsets);
  c.dtype("dy", dy, x.dtype());
  c.shape("dy", dy, {p.R, p.n});
  c.contiguous("dy", dy);
  Tensor dx = need_x ? x.empty({p.R, p.k}, x.dtype()) : x.empty({0}, x.dtype());
  if (need_x) multiply(p, dy.ptr<const char>(), p.n * p.bytes, p.n, p.k, true, dx.ptr<char>());
  // laid out as w is: the gradient of an [E, n, k] parameter is contiguous
  const int64_t sizes[] = {p.E, p.k, p.n}, strides[] = {p.k * p.n, p.k_contiguous ? 1 : p.n, p.k_contiguous ? p.k : 1};
  Tensor dw = need_w ? x.empty_strided(sizes, strides, x.dtype()) : x.empty({0}, x.dtype());
  if (need_w) {
    advise_huge_pages(dw.data(), dw.numel() * p.bytes);
    weight_gradient(p, dy.ptr<const char>(), dw.ptr<char>());
  }
  return {std::move(dx), std::move(dw)};
}

const auto library = Library::impl("sail_ops", "CPU")
                         .kernel<grouped_mm>("grouped_mm")
                         .kernel<grouped_mm_backward>("grouped_mm_backward");
}  // namespace
}  // namespace sail::cpu
