// The norms on the CPU: check, split the rows over threads, call the active instruction set's kernel.
#include "kernels/norm.h"

#include <algorithm>
#include <memory>

#include "../torch/norm.h"
#include "rows.h"

namespace sail::cpu {
namespace {
using NormKernel = void (*const (&)[3])(const NormRow&);
using BackwardKernel = void (*const (&)[3])(const NormBackwardRows&);

// Rows that share one partial dweight, summed in fp32 by groups of four. Fixed, so that the sum's order, and every bit
// of it, is the same for any number of threads; the partial sums are then 1/16 of the size of x in bf16.
constexpr int64_t kBlock = 32;
constexpr int64_t kParallelFrom = 32768;  // elements; below, starting the threads costs more than they save

int threads(int64_t elements) { return elements < kParallelFrom ? 1 : num_threads(); }

// (norm(x), nothing), or (norm(x + residual), the sum)
std::pair<Tensor, OptTensor> forward(const Check& c, NormKernel kernels, const Tensor& x, const Tensor* residual,
                                     const Tensor& weight, const OptTensor& bias, double eps) {
  const DType dtype = check_norm(c, x, residual, weight, bias);
  const StridedRows in(c, "x", x);
  std::optional<StridedRows> in2, out2;
  if (residual) in2.emplace(c, "residual", *residual);
  Tensor y = huge_like(x);
  const StridedRows out(c, "y", y);
  OptTensor sum;
  if (residual) sum.emplace(huge_like(x)), out2.emplace(c, "sum", *sum);
  const auto kernel = kernels[static_cast<int>(dtype)];
#pragma omp parallel for num_threads(threads(x.numel()))
  for (int64_t r = 0; r < in.count(); r++)
    kernel({.x = in[r],
            .residual = in2 ? (*in2)[r] : nullptr,
            .weight = weight.data(),
            .bias = bias ? bias->data() : nullptr,
            .y = out[r],
            .sum = out2 ? (*out2)[r] : nullptr,
            .D = in.width(),
            .eps = static_cast<float>(eps)});
  return {std::move(y), std::move(sum)};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return forward(Check("rms_norm"), norm_kernels().rms_norm, x, nullptr, weight, std::nullopt, eps).first;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  const Check c("add_rms_norm");
  auto [y, sum] = forward(c, norm_kernels().rms_norm, x, &residual, weight, std::nullopt, eps);
  return {std::move(y), std::move(*sum)};
}

Tensor layer_norm(const Tensor& x, const Tensor& weight, const OptTensor& bias, double eps) {
  return forward(Check("layer_norm"), norm_kernels().layer_norm, x, nullptr, weight, bias, eps).first;
}

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                          const OptTensor& bias, double eps) {
  auto [y, sum] = forward(Check("add_layer_norm"), norm_kernels().layer_norm, x, &residual, weight, bias, eps);
  return {std::move(y), std::move(*sum)};
}

// A sum over the rows, by blocks; with no elements where it is not needed.
struct ColumnSums {
  Tensor out;
  int64_t D, stride, blocks;
  std::unique_ptr<float[]> partial;  // [blocks, stride]

  ColumnSums(const Tensor& weight, bool needed, int64_t rows)
      : out(empty(weight, needed)), D(weight.size(0)), stride(norm_partial(D)), blocks((rows + kBlock - 1) / kBlock) {
    if (needed) partial = std::make_unique<float[]>(blocks * stride);
  }
  static Tensor empty(const Tensor& weight, bool needed) {
    const int64_t n[] = {needed ? weight.size(0) : 0};
    return weight.empty(n, weight.dtype());
  }
  float* block(int64_t b) const { return partial ? &partial[b * stride] : nullptr; }
  void finish(DType dtype) const {
    constexpr int64_t kColumns = 256;
    if (!partial) return;
    const auto kernel = norm_kernels().sum_rows[static_cast<int>(dtype)];
#pragma omp parallel for num_threads(threads(blocks* D))
    for (int64_t n = 0; n < D; n += kColumns)
      kernel(&partial[n], blocks, stride, std::min(kColumns, D - n), out.ptr<char>() + n * element_size(dtype));
  }
};

// Gradients of x (plus grad_sum), of the weight and of the bias; one that is not needed comes back with no elements.
std::tuple<Tensor, Tensor, Tensor> backward(const Check& c, BackwardKernel kernels, const Tensor& grad,
                                            const OptTensor& grad_sum, const Tensor& x, const Tensor& weight,
                                            double eps, bool need_dx, bool need_dweight, bool need_dbias) {
  const DType dtype = check_norm_backward(c, grad, grad_sum, x, weight);
  const StridedRows in(c, "x", x), in_grad(c, "grad", grad);
  std::optional<StridedRows> in_sum, out;
  if (grad_sum) in_sum.emplace(c, "grad_sum", *grad_sum);
  const int64_t rows = in.count(), none[] = {0};
  Tensor dx = need_dx ? huge_like(x) : x.empty(none, x.dtype());
  if (need_dx) out.emplace(c, "dx", dx);
  ColumnSums dweight(weight, need_dweight, rows), dbias(weight, need_dbias, rows);
  const auto kernel = kernels[static_cast<int>(dtype)];
  const bool stream = need_dx && streams(c, dx, in.width());
#pragma omp parallel for num_threads(threads(x.numel()))
  for (int64_t b = 0; b < dweight.blocks; b++)
    for (int64_t r = b * kBlock, stop = std::min(rows, r + kBlock); r < stop; r += kNormGroup) {
      NormBackwardRows group = {};
      group.stream = stream;
      group.weight = weight.data(), group.dweight = dweight.block(b), group.dbias = dbias.block(b);
      group.D = in.width(), group.eps = static_cast<float>(eps);
      group.rows = static_cast<int>(std::min<int64_t>(kNormGroup, stop - r));
      for (int i = 0; i < group.rows; i++) {
        group.grad[i] = in_grad[r + i], group.x[i] = in[r + i];
        group.grad_sum[i] = in_sum ? (*in_sum)[r + i] : nullptr;
        group.dx[i] = out ? (*out)[r + i] : nullptr;
      }
      kernel(group);
    }
  dweight.finish(dtype), dbias.finish(dtype);
  return {std::move(dx), std::move(dweight.out), std::move(dbias.out)};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const OptTensor& grad_sum, const Tensor& x,
                                             const Tensor& weight, double eps, bool need_dx, bool need_dweight) {
  auto [dx, dweight, none] = backward(Check("rms_norm_backward"), norm_kernels().rms_norm_backward, grad, grad_sum, x,
                                      weight, eps, need_dx, need_dweight, false);
  return {std::move(dx), std::move(dweight)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const OptTensor& grad_sum, const Tensor& x,
                                                       const Tensor& weight, double eps, bool need_dx,
                                                       bool need_dweight, bool need_dbias) {
  return backward(Check("layer_norm_backward"), norm_kernels().layer_norm_backward, grad, grad_sum, x, weight, eps,
                  need_dx, need_dweight, need_dbias);
}

const auto library = Library::impl("sail_ops", "CPU")
                         .kernel<rms_norm>("rms_norm")
                         .kernel<add_rms_norm>("add_rms_norm")
                         .kernel<rms_norm_backward>("rms_norm_backward")
                         .kernel<layer_norm>("layer_norm")
                         .kernel<add_layer_norm>("add_layer_norm")
                         .kernel<layer_norm_backward>("layer_norm_backward");
}  // namespace
}  // namespace sail::cpu
