// RMSNorm on the CPU: check, split the rows over threads, call the active instruction set's kernel.
#include "../torch/checks.h"
#include "isa.h"
#include "kernels/norm.h"

namespace sail::cpu {
namespace {
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Check c("rms_norm");
  const DType dt = c.real("x", x);
  c.that(x.dim() >= 1, "x", "a scalar", "[..., D]");
  c.contiguous("x", x);
  const int64_t D = x.size(-1);
  c.positive("x", "D", D);
  c.dtype("weight", weight, x.dtype());
  c.shape("weight", weight, {D});
  c.contiguous("weight", weight);
  Tensor y = x.empty_like();
  const auto kernel = norm_kernels().rms_norm[static_cast<int>(dt)];
  const int64_t rows = x.numel() / D;
  const int64_t bytes = D * (dt == DType::f32 ? 4 : 2);
  const auto *xp = x.ptr<const char>(), *wp = weight.ptr<const char>();
  auto* yp = y.ptr<char>();
#pragma omp parallel for num_threads(num_threads()) if (x.numel() > 32768)
  for (int64_t r = 0; r < rows; r++) kernel(xp + r * bytes, wp, yp + r * bytes, D, static_cast<float>(eps));
  return y;
}

const auto library = Library::impl("sail_ops", "CPU").kernel<rms_norm>("rms_norm");
}  // namespace
}  // namespace sail::cpu
