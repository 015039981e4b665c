// Bare grouped GEMM on CUDA: y[r] = x[r] @ w[e] for the rows of expert e. A weight [E, k, n] may be contiguous along n or,
// as the transposed view of an [E, n, k] parameter, along k; neither is copied.
#include "cutlass/grouped_mm.h"
#include "moe.h"

namespace sail::cuda {
namespace {
// out[r] = a[r] . B, B = w's expert read as [k, n] (`transposed` false) or as [n, k]
void multiply(const Call& call, const MatrixProblem& p, const Tensor& w, const Rows& a, bool transposed,
              const int32_t* offsets, const Tensor& out) {
  if (!p.R) return;
  const int64_t columns = transposed ? p.k : p.n, depth = transposed ? p.n : p.k;
  const bool along_depth = p.k_contiguous != transposed;
  const int64_t rows_of_b = along_depth ? columns : depth;
  RowsProblem problem = {};
  problem.a = a, problem.b = {w.data(), nullptr, w.stride(0), p.ldw, rows_of_b};
  problem.layout = along_depth ? Layout::nk : Layout::kn, problem.offsets = offsets, problem.zero_tail = true;
  problem.R = p.R, problem.E = p.E, problem.N = columns, problem.K = depth;
  const StoreRows to = {out.data(), columns, nullptr, nullptr};
  if (prefers_cutlass(call.card) && cutlass_gemm->takes(problem, to)) {
    const Tensor memory = call.floats((cutlass_gemm->workspace(problem, call.launch(p.dtype)) + 3) / 4);
    return cutlass_gemm->run(problem, to, call.launch(p.dtype), memory.data());
  }
  grouped_gemm(call.card, problem, to, call.launch(p.dtype));
}

Tensor grouped_mm_cuda(const Tensor& x, const Tensor& w, const Tensor& offsets) {
  const Check c("grouped_mm");
  const MatrixProblem p = check_grouped_mm(c, x, w, offsets);
  const DeviceGuard guard(x.device_index());
  const Call call(c, x);
  const Tensor starts = clamped_offsets(call, offsets, p.R, p.E);
  Tensor y = call.buffer(p.R, p.n);
  multiply(call, p, w, {x.data(), x.stride(0), nullptr}, false, starts.ptr<const int32_t>(), y);
  return y;
}

std::tuple<Tensor, Tensor> grouped_mm_backward_cuda(const Tensor& dy, const Tensor& x, const Tensor& w,
                                                    const Tensor& offsets, bool need_x, bool need_w) {
  const Check c("grouped_mm_backward");
  const MatrixProblem p = check_grouped_mm(c, x, w, offsets);
  c.dtype("dy", dy, x.dtype());
  c.shape("dy", dy, {p.R, p.n});
  c.contiguous("dy", dy);
  const DeviceGuard guard(x.device_index());
  const Call call(c, x);
  const Tensor starts = clamped_offsets(call, offsets, p.R, p.E);
  const Rows x_rows = {x.data(), x.stride(0), nullptr}, dy_rows = {dy.data(), p.n, nullptr};
  Tensor dx = need_x ? call.buffer(p.R, p.k) : x.empty({0}, x.dtype());
  if (need_x) multiply(call, p, w, dy_rows, true, starts.ptr<const int32_t>(), dx);
  // laid out as w is: the gradient of an [E, n, k] parameter is contiguous
  const int64_t sizes[] = {p.E, p.k, p.n}, strides[] = {p.k * p.n, p.k_contiguous ? 1 : p.n, p.k_contiguous ? p.k : 1};
  Tensor dw = need_w ? x.empty_strided(sizes, strides, x.dtype()) : x.empty({0}, x.dtype());
  if (need_w) {
    const int64_t M = p.k_contiguous ? p.n : p.k, N = p.k_contiguous ? p.k : p.n;
    WgradProblem problem = {};
    problem.a = p.k_contiguous ? dy_rows : x_rows, problem.b = p.k_contiguous ? x_rows : dy_rows;
    problem.offsets = starts.ptr<const int32_t>();
    problem.R = p.R, problem.E = p.E, problem.M = M, problem.N = N;
    const StoreGrad out = {{dw.data(), nullptr, M * N, N, M}, false, false};
    grouped_gemm(call.card, problem, out, call.launch(p.dtype));
  }
  return {std::move(dx), std::move(dw)};
}

const auto library = Library::impl("sail_ops", "CUDA")
                         .kernel<grouped_mm_cuda>("grouped_mm")
                         .kernel<grouped_mm_backward_cuda>("grouped_mm_backward");
}  // namespace
}  // namespace sail::cuda
