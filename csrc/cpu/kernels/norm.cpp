#include "norm.h"

#include "vec.h"

namespace sail::cpu::SAIL_ISA {
namespace {
template <class T> void rms_norm_kernel(const void* xp, const void* wp, void* yp, int64_t D, float eps) {
  const T *x = static_cast<const T*>(xp), *w = static_cast<const T*>(wp);
  T* y = static_cast<T*>(yp);
  vf acc = {};
  for (int64_t c = 0; c < D; c += W) {
    const vf v = load_part(x + c, D - c);
    acc = fma(v, v, acc);
  }
  const float r = 1.f / sqrtf(sum(acc) / static_cast<float>(D) + eps);
  for (int64_t c = 0; c < D; c += W) {
    const int64_t n = D - c;
    store_part(y + c, load_part(x + c, n) * r * load_part(w + c, n), n);
  }
}
}  // namespace

const NormKernels kNorm = {{rms_norm_kernel<float>, rms_norm_kernel<bf16>, rms_norm_kernel<f16>}};
}  // namespace sail::cpu::SAIL_ISA
