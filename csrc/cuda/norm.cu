// RMSNorm on CUDA: check, pick vector width and block size, launch. Nothing synchronizes, so a CUDA graph can hold it.
#include <algorithm>

#include "kernels/rms_norm.cuh"
#include "launch.h"

namespace sail::cuda {
namespace {
constexpr int64_t kMaxGrid = 0x7fffffff;
constexpr int64_t kSharedBytes = 47 * 1024;  // dynamic, without opting in to more; block_sum's 256 bytes beside it

void check_like(const Check& c, const char* arg, const Tensor& t, const Tensor& x) {
  c.same_device(arg, t, x);
  c.dtype(arg, t, x.dtype());
  c.that(t.dim() == x.dim() && std::equal(x.sizes(), x.sizes() + x.dim(), t.sizes()), arg, "shape " + shape_text(t),
         "shape " + shape_text(x));
}

// [..., D] and [D]; returns the dtype
DType check_x_weight(const Check& c, const Tensor& x, const Tensor& weight) {
  const DType dtype = c.real("x", x);
  c.rows("x", x);
  c.same_device("weight_D", weight, x);
  c.dtype("weight_D", weight, x.dtype());
  c.shape("weight_D", weight, {x.size(-1)});
  c.contiguous("weight_D", weight);
  return dtype;
}

// Whole warps that cover a row once, at most 256 threads; not tuned, as no card has run it yet
int block_size(int64_t D, int width) {
  const int64_t warps = (D + width * 32 - 1) / (width * 32);
  return static_cast<int>(std::min<int64_t>(warps, 8) * 32);
}

void launch_forward(const char* op, DType dtype, const RmsNormForward& a, bool add, const Tensor& x) {
  if (!a.rows) return;
  const int64_t element = dtype == DType::f32 ? 4 : 2;
  const bool vectors = aligned(element, {a.x, a.residual, a.weight, a.y, a.sum}, {a.D, a.x_stride, a.residual_stride});
  const DeviceGuard guard(x.device_index());
  const cudaStream_t stream = current_stream(x);
  const auto grid = static_cast<unsigned>(std::min(a.rows, kMaxGrid));
  dispatch(dtype, vectors, [&](auto t, auto width) {
    using T = decltype(t);
    constexpr int N = decltype(width)::value;
    const auto kernel = add ? rms_norm_kernel<T, N, true> : rms_norm_kernel<T, N, false>;
    launch(kernel, grid, block_size(a.D, N), 0, stream, a);
  });
  check_launch(op);
}

Tensor rms_norm_cuda(const Tensor& x, const Tensor& weight, double eps) {
  const Check c("rms_norm");
  const DType dtype = check_x_weight(c, x, weight);
  Tensor y = x.empty_like();
  RmsNormForward a = {};
  a.x = x.data(), a.weight = weight.data(), a.y = y.data();
  a.D = x.size(-1), a.rows = x.numel() / a.D, a.x_stride = row_stride(c, "x", x), a.eps = static_cast<float>(eps);
  launch_forward("rms_norm", dtype, a, false, x);
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm_cuda(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                             double eps) {
  const Check c("add_rms_norm");
  const DType dtype = check_x_weight(c, x, weight);
  check_like(c, "residual", residual, x);
  Tensor y = x.empty_like(), sum = x.empty_like();
  RmsNormForward a = {};
  a.x = x.data(), a.residual = residual.data(), a.weight = weight.data(), a.y = y.data(), a.sum = sum.data();
  a.D = x.size(-1), a.rows = x.numel() / a.D, a.x_stride = row_stride(c, "x", x);
  a.residual_stride = row_stride(c, "residual", residual), a.eps = static_cast<float>(eps);
  launch_forward("add_rms_norm", dtype, a, true, x);
  return {std::move(y), std::move(sum)};
}

void launch_backward(DType dtype, RmsNormBackward a, const Tensor& x, void* dweight) {
  const int64_t element = dtype == DType::f32 ? 4 : 2, blocks = (a.rows + kRowsPerBlock - 1) / kRowsPerBlock;
  const bool vectors =
      aligned(element, {a.grad, a.grad_sum, a.x, a.weight, a.dx}, {a.D, a.grad_stride, a.grad_sum_stride, a.x_stride});
  const int64_t shared = a.partial ? a.D * 4 : 0;
  a.shared_dweight = shared && shared <= kSharedBytes;
  const DeviceGuard guard(x.device_index());
  const cudaStream_t stream = current_stream(x);
  dispatch(dtype, vectors, [&](auto t, auto width) {
    using T = decltype(t);
    constexpr int N = decltype(width)::value;
    if (blocks)
      launch(rms_norm_backward_kernel<T, N>, static_cast<unsigned>(blocks), block_size(a.D, N),
             a.shared_dweight ? shared : 0, stream, a);
    if (!dweight) return;
    const auto columns = static_cast<unsigned>((a.D + kSumColumns - 1) / kSumColumns);
    launch(sum_rows_kernel<T>, columns, dim3(kSumColumns, kSumGroups), 0, stream, a.partial, blocks, a.D, dweight);
  });
  check_launch("rms_norm_backward");
}

// Gradients of x (plus grad_sum) and of the weight; one that is not needed comes back with no elements.
std::tuple<Tensor, Tensor> rms_norm_backward_cuda(const Tensor& grad, const std::optional<Tensor>& grad_sum,
                                                  const Tensor& x, const Tensor& weight, double eps, bool need_dx,
                                                  bool need_dweight) {
  const Check c("rms_norm_backward");
  const DType dtype = check_x_weight(c, x, weight);
  check_like(c, "grad", grad, x);
  if (grad_sum) check_like(c, "grad_sum", *grad_sum, x);
  const int64_t D = x.size(-1), rows = x.numel() / D, blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  const int64_t none[] = {0}, partial_shape[] = {need_dweight ? blocks : 0, D};
  Tensor dx = need_dx ? x.empty_like() : x.empty(none, x.dtype());
  Tensor dweight = need_dweight ? weight.empty_like() : x.empty(none, x.dtype());
  const Tensor partial = x.empty(partial_shape, aoti_torch_dtype_float32());
  RmsNormBackward a = {};
  a.grad = grad.data(), a.grad_sum = grad_sum ? grad_sum->data() : nullptr, a.x = x.data(), a.weight = weight.data();
  a.dx = need_dx ? dx.data() : nullptr, a.partial = need_dweight ? partial.ptr<float>() : nullptr;
  a.rows = rows, a.D = D, a.grad_stride = row_stride(c, "grad", grad), a.x_stride = row_stride(c, "x", x);
  a.grad_sum_stride = grad_sum ? row_stride(c, "grad_sum", *grad_sum) : 0, a.eps = static_cast<float>(eps);
  if (need_dx || need_dweight) launch_backward(dtype, a, x, need_dweight ? dweight.data() : nullptr);
  return {std::move(dx), std::move(dweight)};
}

const auto library = Library::impl("sail_ops", "CUDA")
                         .kernel<rms_norm_cuda>("rms_norm")
                         .kernel<add_rms_norm_cuda>("add_rms_norm")
                         .kernel<rms_norm_backward_cuda>("rms_norm_backward");
}  // namespace
}  // namespace sail::cuda
