#include "activation.h"

#include "loop.h"

namespace sail::cpu::SAIL_ISA {
namespace {
template <class T> void swiglu_kernel(const void* gp, const void* up, void* op, int64_t n) {
  const T *gate = static_cast<const T*>(gp), *u = static_cast<const T*>(up);
  T* out = static_cast<T*>(op);
  for_vectors(n, [=](int64_t c, auto lanes) {
    const vf g = load(gate + c, lanes);
    store(out + c, g * sigmoid(g) * load(u + c, lanes), lanes);
  });
}

// with s = sigmoid(gate): dgate = grad up s (1 + gate (1 - s)), dup = grad gate s
template <class T>
void swiglu_backward_kernel(const void* dp, const void* gp, const void* up, void* dgp, void* dup, int64_t n) {
  const T *grad = static_cast<const T*>(dp), *gate = static_cast<const T*>(gp), *u = static_cast<const T*>(up);
  T *dgate = static_cast<T*>(dgp), *du = static_cast<T*>(dup);
  for_vectors(n, [=](int64_t c, auto lanes) {
    const vf g = load(gate + c, lanes), d = load(grad + c, lanes), s = sigmoid(g);
    store(dgate + c, d * load(u + c, lanes) * s * (1.f + g * (1.f - s)), lanes);
    store(du + c, d * g * s, lanes);
  });
}
}  // namespace

const ActivationKernels kActivation = {
    {swiglu_kernel<float>, swiglu_kernel<bf16>, swiglu_kernel<f16>},
    {swiglu_backward_kernel<float>, swiglu_backward_kernel<bf16>, swiglu_backward_kernel<f16>},
};
}  // namespace sail::cpu::SAIL_ISA
