// SwiGLU on CUDA. The work is cut into pieces of a row, or of the whole tensor where all arguments are contiguous.
#include "kernels/activation.cuh"

#include "../torch/activation.h"
#include "launch.h"

namespace sail::cuda {
namespace {
void launch_swiglu(const Check& c, DType dtype, SwiGLU a, const Tensor& gate, bool backward) {
  if (!gate.numel()) return;
  int64_t rows = gate.numel() / gate.size(-1);
  a.width = gate.size(-1);
  if (a.gate_stride == a.width && a.up_stride == a.width && (!backward || a.grad_stride == a.width))
    a.width *= rows, rows = 1;
  const bool vectors =
      aligned(dtype == DType::f32 ? 4 : 2, {a.gate, a.up, a.grad, a.out, a.dgate, a.dup},
              {a.width, rows > 1 ? a.gate_stride : 0, rows > 1 ? a.up_stride : 0, rows > 1 ? a.grad_stride : 0});
  const DeviceGuard guard(gate.device_index());
  const Stream stream = current_stream(c, gate);
  dispatch(dtype, vectors, [&](auto t, auto width) {
    using T = decltype(t);
    constexpr int N = decltype(width)::value;
    constexpr int64_t piece = kActivationThreads * kActivationSteps * N;
    a.per_row = (a.width + piece - 1) / piece;
    c.that(rows * a.per_row <= INT32_MAX, "gate", "shape " + shape_text(gate), "at most 2147483647 pieces of a row");
    const auto kernel = backward ? swiglu_backward_kernel<T, N> : swiglu_kernel<T, N>;
    launch(kernel, rows * a.per_row, kActivationThreads, 0, stream, a);
  });
}

Tensor swiglu_cuda(const Tensor& gate, const Tensor& up) {
  const Check c("swiglu");
  const DType dtype = check_swiglu(c, gate, up);
  Tensor out = gate.empty_like();
  SwiGLU a = {};
  a.gate = gate.data(), a.up = up.data(), a.out = out.data();
  a.gate_stride = row_stride(c, "gate", gate), a.up_stride = row_stride(c, "up", up);
  launch_swiglu(c, dtype, a, gate, false);
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward_cuda(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  const Check c("swiglu_backward");
  const DType dtype = check_swiglu(c, gate, up);
  c.like("grad", grad, gate);
  Tensor dgate = gate.empty_like(), dup = gate.empty_like();
  SwiGLU a = {};
  a.gate = gate.data(), a.up = up.data(), a.grad = grad.data(), a.dgate = dgate.data(), a.dup = dup.data();
  a.gate_stride = row_stride(c, "gate", gate), a.up_stride = row_stride(c, "up", up);
  a.grad_stride = row_stride(c, "grad", grad);
  launch_swiglu(c, dtype, a, gate, true);
  return {std::move(dgate), std::move(dup)};
}

const auto library =
    Library::impl("sail_ops", "CUDA").kernel<swiglu_cuda>("swiglu").kernel<swiglu_backward_cuda>("swiglu_backward");
}  // namespace
}  // namespace sail::cuda
