#include "activation.h"

#include "pairs.h"

namespace sail::cpu::SAIL_ISA {
namespace {
vf2 sigmoid(vf2 x) { return {fast_sigmoid(x.a), fast_sigmoid(x.b)}; }

template <class T> void swiglu_kernel(const void* gp, const void* up, void* op, int64_t n, bool stream) {
  const T *gate = static_cast<const T*>(gp), *u = static_cast<const T*>(up);
  T* out = static_cast<T*>(op);
  for_pairs(n, [=](int64_t c, auto lanes) {
    const vf2 g = load2(gate + c, lanes);
    put2(out + c, g * sigmoid(g) * load2(u + c, lanes), lanes, stream);
  });
  if (stream) fence();
}

// with s = sigmoid(gate): dgate = grad up s (1 + gate (1 - s)), dup = grad gate s
template <class T>
void swiglu_backward_kernel(const void* dp, const void* gp, const void* up, void* dgp, void* dup, int64_t n,
                            bool stream) {
  const T *grad = static_cast<const T*>(dp), *gate = static_cast<const T*>(gp), *u = static_cast<const T*>(up);
  T *dgate = static_cast<T*>(dgp), *du = static_cast<T*>(dup);
  for_pairs(n, [=](int64_t c, auto lanes) {
    const vf2 g = load2(gate + c, lanes), d = load2(grad + c, lanes), s = sigmoid(g);
    const vf2 slope = {1.f + g.a * (1.f - s.a), 1.f + g.b * (1.f - s.b)};
    put2(dgate + c, d * load2(u + c, lanes) * s * slope, lanes, stream);
    put2(du + c, d * g * s, lanes, stream);
  });
  if (stream) fence();
}
}  // namespace

const ActivationKernels kActivation = {
    {swiglu_kernel<float>, swiglu_kernel<bf16>, swiglu_kernel<f16>},
    {swiglu_backward_kernel<float>, swiglu_backward_kernel<bf16>, swiglu_backward_kernel<f16>},
};
}  // namespace sail::cpu::SAIL_ISA
