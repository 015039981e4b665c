// RMSNorm on the CPU: check, split the rows over threads, call the active instruction set's kernel.
#include "kernels/norm.h"

#include <algorithm>
#include <memory>

#include "rows.h"

namespace sail::cpu {
namespace {
// Rows that share one partial dweight. Fixed, so that the sum's order, and every bit of it, is the same for any number
// of threads; the fp64 partial sums are then 1/8 of the size of x in bf16.
constexpr int64_t kBlock = 32;
constexpr int64_t kParallelFrom = 32768;  // elements; below, starting the threads costs more than they save

int threads(int64_t elements) { return elements < kParallelFrom ? 1 : num_threads(); }

void check_like(const Check& c, const char* arg, const Tensor& t, const Tensor& x) {
  c.same_device(arg, t, x);
  c.dtype(arg, t, x.dtype());
  c.that(t.dim() == x.dim() && std::equal(x.sizes(), x.sizes() + x.dim(), t.sizes()), arg, "shape " + shape_text(t),
         "shape " + shape_text(x));
}

void check_weight(const Check& c, const Tensor& weight, const Tensor& x) {
  c.same_device("weight_D", weight, x);
  c.dtype("weight_D", weight, x.dtype());
  c.shape("weight_D", weight, {x.size(-1)});
  c.contiguous("weight_D", weight);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Check c("rms_norm");
  const Rows in(c, "x", x);
  check_weight(c, weight, x);
  Tensor y = x.empty_like();
  const Rows out(c, "y", y);
  const auto kernel = norm_kernels().rms_norm[static_cast<int>(c.real("x", x))];
#pragma omp parallel for num_threads(threads(x.numel()))
  for (int64_t r = 0; r < in.count(); r++) kernel(in[r], weight.data(), out[r], in.width(), static_cast<float>(eps));
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  const Check c("add_rms_norm");
  const Rows in(c, "x", x);
  check_like(c, "residual", residual, x);
  const Rows in2(c, "residual", residual);
  check_weight(c, weight, x);
  Tensor y = x.empty_like(), sum = x.empty_like();
  const Rows out(c, "y", y), out2(c, "sum", sum);
  const auto kernel = norm_kernels().add_rms_norm[static_cast<int>(c.real("x", x))];
#pragma omp parallel for num_threads(threads(x.numel()))
  for (int64_t r = 0; r < in.count(); r++)
    kernel(in[r], in2[r], weight.data(), out[r], out2[r], in.width(), static_cast<float>(eps));
  return {std::move(y), std::move(sum)};
}

// Gradients of x (plus grad_sum) and of the weight; one that is not needed comes back with no elements.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const std::optional<Tensor>& grad_sum, const Tensor& x,
                                             const Tensor& weight, double eps, bool need_dx, bool need_dweight) {
  const Check c("rms_norm_backward");
  const Rows in(c, "x", x);
  check_like(c, "grad", grad, x);
  const Rows in_grad(c, "grad", grad);
  std::optional<Rows> in_sum;
  if (grad_sum) {
    check_like(c, "grad_sum", *grad_sum, x);
    in_sum.emplace(c, "grad_sum", *grad_sum);
  }
  check_weight(c, weight, x);
  const int64_t rows = in.count(), D = in.width(), blocks = (rows + kBlock - 1) / kBlock;
  const int64_t none[] = {0};
  Tensor dx = need_dx ? x.empty_like() : x.empty(none, x.dtype());
  Tensor dweight = need_dweight ? weight.empty_like() : x.empty(none, x.dtype());
  std::optional<Rows> out;
  if (need_dx) out.emplace(c, "dx", dx);
  const auto partial = std::make_unique<double[]>(need_dweight ? blocks * D : 0);
  const auto& kernels = norm_kernels();
  const int dtype = static_cast<int>(c.real("x", x));
#pragma omp parallel for num_threads(threads(x.numel()))
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t r = b * kBlock, stop = std::min(rows, r + kBlock); r < stop; r += kNormGroup) {
      RmsNormBackwardRows group = {};
      group.weight = weight.data(), group.dweight = need_dweight ? &partial[b * D] : nullptr;
      group.D = D, group.eps = static_cast<float>(eps);
      group.rows = static_cast<int>(std::min<int64_t>(kNormGroup, stop - r));
      for (int i = 0; i < group.rows; i++) {
        group.grad[i] = in_grad[r + i], group.x[i] = in[r + i];
        group.grad_sum[i] = in_sum ? (*in_sum)[r + i] : nullptr;
        group.dx[i] = out ? (*out)[r + i] : nullptr;
      }
      kernels.rms_norm_backward[dtype](group);
    }
  if (need_dweight) {
    constexpr int64_t kColumns = 256;
#pragma omp parallel for num_threads(threads(blocks* D))
    for (int64_t n = 0; n < D; n += kColumns)
      kernels.sum_rows[dtype](&partial[n], blocks, D, std::min(kColumns, D - n),
                              dweight.ptr<char>() + n * element_size(static_cast<DType>(dtype)));
  }
  return {std::move(dx), std::move(dweight)};
}

const auto library = Library::impl("sail_ops", "CPU")
                         .kernel<rms_norm>("rms_norm")
                         .kernel<add_rms_norm>("add_rms_norm")
                         .kernel<rms_norm_backward>("rms_norm_backward");
}  // namespace
}  // namespace sail::cpu
