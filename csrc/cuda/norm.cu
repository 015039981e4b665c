// The norms on CUDA: check, plan the rows of a block, launch. Nothing synchronizes, so a CUDA graph can hold it.
#include "kernels/norm.cuh"

#include "../torch/norm.h"
#include "card.h"
#include "rows.h"

namespace sail::cuda {
namespace {

// Threads of a block of short rows: few, so that none waits for many rows. Not tuned, as no card has run it yet.
constexpr int kForwardBlock = 128;

// Calls f(T{}, width, kept) with kept as a type.
template <bool kValue> struct Kept {
  static constexpr bool value = kValue;
};
template <class F> void dispatch_rows(DType dtype, bool vectors, bool kept, F f) {
  dispatch(dtype, vectors, [&](auto t, auto width) { kept ? f(t, width, Kept<true>{}) : f(t, width, Kept<false>{}); });
}

void check_rows(const Check& c, const Tensor& x) {
  c.that(x.numel() / x.size(-1) <= INT32_MAX, "x", "shape " + shape_text(x), "at most 2147483647 rows");
}

template <bool kLayer>
void launch_forward(const Check& c, DType dtype, const NormForward& a, const Tensor& x) {
  if (!a.rows) return;
  const bool vectors = aligned(element_size(dtype), {a.x, a.residual, a.weight, a.bias, a.y, a.sum},
                               {a.D, a.x_stride, a.residual_stride});
  const DeviceGuard guard(x.device_index());
  const Stream stream = current_stream(c, x);
  const RowPlan plan = plan_rows(a.D, vector_width(dtype, vectors), kForwardBlock);
  const int64_t blocks = (a.rows + plan.slots - 1) / plan.slots;
  dispatch_rows(dtype, vectors, plan.kept, [&](auto t, auto width, auto kept) {
    launch(norm_kernel<decltype(t), decltype(width)::value, decltype(kept)::value, kLayer>, blocks,
           dim3(plan.threads, plan.slots), 0, stream, a);
  });
}

// (norm(x), nothing), or (norm(x + residual), the sum)
template <bool kLayer>
std::pair<Tensor, OptTensor> forward(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight,
                                     const OptTensor& bias, double eps) {
  const Check c(op);
  const DType dtype = check_norm(c, x, residual, weight, bias);
  check_rows(c, x);
  Tensor y = x.empty_like();
  OptTensor sum;
  NormForward a = {};
  a.x = x.data(), a.weight = weight.data(), a.bias = bias ? bias->data() : nullptr, a.y = y.data();
  a.D = x.size(-1), a.rows = x.numel() / a.D, a.x_stride = row_stride(c, "x", x), a.eps = static_cast<float>(eps);
  if (residual) {
    sum.emplace(x.empty_like());
    a.residual = residual->data(), a.sum = sum->data(), a.residual_stride = row_stride(c, "residual", *residual);
  }
  launch_forward<kLayer>(c, dtype, a, x);
  return {std::move(y), std::move(sum)};
}

Tensor rms_norm_cuda(const Tensor& x, const Tensor& weight, double eps) {
  return forward<false>("rms_norm", x, nullptr, weight, std::nullopt, eps).first;
}
std::tuple<Tensor, Tensor> add_rms_norm_cuda(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                             double eps) {
  auto [y, sum] = forward<false>("add_rms_norm", x, &residual, weight, std::nullopt, eps);
  return {std::move(y), std::move(*sum)};
}
Tensor layer_norm_cuda(const Tensor& x, const Tensor& weight, const OptTensor& bias, double eps) {
  return forward<true>("layer_norm", x, nullptr, weight, bias, eps).first;
}
std::tuple<Tensor, Tensor> add_layer_norm_cuda(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                               const OptTensor& bias, double eps) {
  auto [y, sum] = forward<true>("add_layer_norm", x, &residual, weight, bias, eps);
  return {std::move(y), std::move(*sum)};
}

// Gradients of x (plus grad_sum), of the weight and of the bias; one that is not needed comes back with no elements.
template <bool kLayer>
std::tuple<Tensor, Tensor, Tensor> backward(const char* op, const Tensor& grad, const OptTensor& grad_sum,
                                            const Tensor& x, const Tensor& weight, double eps, bool need_dx,
                                            bool need_dweight, bool need_dbias) {
  const Check c(op);
  const DType dtype = check_norm_backward(c, grad, grad_sum, x, weight);
  check_rows(c, x);
  const int64_t D = x.size(-1), rows = x.numel() / D;
  const auto wanted = [&](bool need) { return weight.empty({need ? D : 0}, weight.dtype()); };
  Tensor dx = need_dx ? x.empty_like() : x.empty({0}, x.dtype());
  Tensor dweight = wanted(need_dweight), dbias = wanted(need_dbias);
  NormBackward a = {};
  a.grad = grad.data(), a.grad_sum = grad_sum ? grad_sum->data() : nullptr, a.x = x.data(), a.weight = weight.data();
  a.dx = need_dx ? dx.data() : nullptr, a.rows = rows, a.D = D, a.eps = static_cast<float>(eps);
  a.grad_stride = row_stride(c, "grad", grad), a.x_stride = row_stride(c, "x", x);
  a.grad_sum_stride = grad_sum ? row_stride(c, "grad_sum", *grad_sum) : 0;
  if (!need_dx && !need_dweight && !need_dbias) return {std::move(dx), std::move(dweight), std::move(dbias)};

  const bool vectors = aligned(element_size(dtype), {a.grad, a.grad_sum, a.x, a.weight, a.dx},
                               {D, a.grad_stride, a.grad_sum_stride, a.x_stride});
  const RowPlan plan = plan_rows(D, vector_width(dtype, vectors), kSumBlock);
  a.rows_of_block = rows_of_block(rows, plan, card_of(c, x).sm_count);
  const int64_t blocks = (rows + a.rows_of_block - 1) / a.rows_of_block;
  const auto partial = [&](bool need) { return x.empty({need ? blocks : 0, D}, aoti_torch_dtype_float32()); };
  const Tensor dweight_blocks = partial(need_dweight), dbias_blocks = partial(need_dbias);
  a.dweight = need_dweight ? dweight_blocks.ptr<float>() : nullptr;
  a.dbias = need_dbias ? dbias_blocks.ptr<float>() : nullptr;
  const DeviceGuard guard(x.device_index());
  const Stream stream = current_stream(c, x);
  dispatch_rows(dtype, vectors, plan.kept, [&](auto t, auto width, auto kept) {
    if (blocks)
      launch(norm_backward_kernel<decltype(t), decltype(width)::value, decltype(kept)::value, kLayer>, blocks,
             dim3(plan.threads, plan.slots), slots_shared(plan, D), stream, a);
  });
  launch_sum_rows(dtype, need_dweight ? column_sum(dweight_blocks, dweight) : ColumnSum{},
                  need_dbias ? column_sum(dbias_blocks, dbias) : ColumnSum{}, D, stream);
  return {std::move(dx), std::move(dweight), std::move(dbias)};
}

std::tuple<Tensor, Tensor> rms_norm_backward_cuda(const Tensor& grad, const OptTensor& grad_sum, const Tensor& x,
                                                  const Tensor& weight, double eps, bool need_dx, bool need_dweight) {
  auto [dx, dweight, none] =
      backward<false>("rms_norm_backward", grad, grad_sum, x, weight, eps, need_dx, need_dweight, false);
  return {std::move(dx), std::move(dweight)};
}
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cuda(const Tensor& grad, const OptTensor& grad_sum,
                                                            const Tensor& x, const Tensor& weight, double eps,
                                                            bool need_dx, bool need_dweight, bool need_dbias) {
  return backward<true>("layer_norm_backward", grad, grad_sum, x, weight, eps, need_dx, need_dweight, need_dbias);
}

const auto library = Library::impl("sail_ops", "CUDA")
                         .kernel<rms_norm_cuda>("rms_norm")
                         .kernel<add_rms_norm_cuda>("add_rms_norm")
                         .kernel<rms_norm_backward_cuda>("rms_norm_backward")
                         .kernel<layer_norm_cuda>("layer_norm")
                         .kernel<add_layer_norm_cuda>("add_layer_norm")
                         .kernel<layer_norm_backward_cuda>("layer_norm_backward");
}  // namespace
}  // namespace sail::cuda
