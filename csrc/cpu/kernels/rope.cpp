// Rotary embedding, with RMSNorm over the head before it or without. A head is a few vectors: it stays in the first-level
// cache between its sums and its results.
#include "rope.h"

#include "loop.h"

namespace sail::cpu::SAIL_ISA {
namespace {
struct Halves {
  vf low, high;
};

template <class T, class Lanes> Halves halves(const T* x, int64_t half, int64_t c, Lanes lanes) {
  return {load(x + c, lanes), load(x + half + c, lanes)};
}

template <class Lanes> Halves rotate(Halves x, const RopeHeads& in, int64_t half, int64_t c, Lanes lanes) {
  const Halves cos = halves(in.cos, half, c, lanes), sin = halves(in.sin, half, c, lanes);
  return {x.low * cos.low - x.high * sin.low, x.high * cos.high + x.low * sin.high};
}
template <class Lanes> Halves rotate_back(Halves y, const RopeHeads& in, int64_t half, int64_t c, Lanes lanes) {
  const Halves cos = halves(in.cos, half, c, lanes), sin = halves(in.sin, half, c, lanes);
  return {y.low * cos.low + y.high * sin.high, y.high * cos.high - y.low * sin.low};
}

template <class T, class Lanes> void put(T* y, int64_t half, int64_t c, Halves v, Lanes lanes) {
  store(y + c, v.low, lanes);
  store(y + half + c, v.high, lanes);
}

template <class T> const T* head(const void* base, int64_t h, int64_t step) {
  return reinterpret_cast<const T*>(static_cast<const char*>(base) + h * step);
}

template <class T, bool TRANSPOSED> void rope_kernel(const RopeHeads& in) {
  const int64_t half = in.A / 2;
  for (int64_t h = 0; h < in.heads; h++) {
    const T* x = TRANSPOSED ? head<T>(in.grad, h, in.grad_step) : head<T>(in.x, h, in.x_step);
    T* y = static_cast<T*>(in.y) + h * in.A;
    for_vectors(half, [&](int64_t c, auto lanes) {
      const Halves v = halves(x, half, c, lanes);
      put(y, half, c, TRANSPOSED ? rotate_back(v, in, half, c, lanes) : rotate(v, in, half, c, lanes), lanes);
    });
  }
}

template <class T> double inverse_rms(const T* x, int64_t A, float eps) {
  const vf squares = sum_vectors<vf>(A, [=](int64_t c, auto lanes, vf& acc) {
    const vf v = load(x + c, lanes);
    acc = fma(v, v, acc);
  });
  return 1 / sqrt(static_cast<double>(sum(squares)) / static_cast<double>(A) + static_cast<double>(eps));
}

template <class T> void norm_rope_kernel(const RopeHeads& in) {
  const int64_t half = in.A / 2;
  const T* w = static_cast<const T*>(in.weight);
  for (int64_t h = 0; h < in.heads; h++) {
    const T* x = head<T>(in.x, h, in.x_step);
    T* y = static_cast<T*>(in.y) + h * in.A;
    const float r = static_cast<float>(inverse_rms(x, in.A, in.eps));
    for_vectors(half, [&](int64_t c, auto lanes) {
      const Halves v = halves(x, half, c, lanes), wv = halves(w, half, c, lanes);
      put(y, half, c, rotate({v.low * r * wv.low, v.high * r * wv.high}, in, half, c, lanes), lanes);
    });
  }
}

// With n the gradient of the norm's result: dx = r (w n - x r^2 mean(w n x)), dweight += sum over heads of n x r
template <class T> void norm_rope_backward_kernel(const RopeHeads& in) {
  const int64_t half = in.A / 2;
  const T* w = static_cast<const T*>(in.weight);
  float* dw = in.dweight;
  for (int64_t h = 0; h < in.heads; h++) {
    const T *x = head<T>(in.x, h, in.x_step), *g = head<T>(in.grad, h, in.grad_step);
    T* dx = static_cast<T*>(in.y) + h * in.A;
    const double inverse = inverse_rms(x, in.A, in.eps);
    const vf dots = sum_vectors<vf>(half, [&](int64_t c, auto lanes, vf& acc) {
      const Halves n = rotate_back(halves(g, half, c, lanes), in, half, c, lanes);
      const Halves v = halves(x, half, c, lanes), wv = halves(w, half, c, lanes);
      acc += fma(n.low * wv.low, v.low, n.high * wv.high * v.high);
    });
    const float r = static_cast<float>(inverse);
    const float dot =
        static_cast<float>(inverse * inverse * static_cast<double>(sum(dots)) / static_cast<double>(in.A));
    for_vectors(half, [&](int64_t c, auto lanes) {
      const Halves n = rotate_back(halves(g, half, c, lanes), in, half, c, lanes);
      const Halves v = halves(x, half, c, lanes), wv = halves(w, half, c, lanes);
      put(dx, half, c, {(wv.low * n.low - v.low * dot) * r, (wv.high * n.high - v.high * dot) * r}, lanes);
      if (!dw) return;
      const Halves before = halves(dw, half, c, lanes);
      put(dw, half, c, {before.low + n.low * (v.low * r), before.high + n.high * (v.high * r)}, lanes);
    });
  }
}

template <class T> void widen_kernel(const void* in, int64_t n, float* out) {
  for_vectors(n, [=](int64_t c, auto lanes) { store(out + c, load(static_cast<const T*>(in) + c, lanes), lanes); });
}

template <class T> void narrow_kernel(const double* in, int64_t n, void* out) {
  for (int64_t i = 0; i < n; i++) from_float(static_cast<float>(in[i]), static_cast<T*>(out) + i);
}
}  // namespace

const RopeKernels kRope = {
    {rope_kernel<float, false>, rope_kernel<bf16, false>, rope_kernel<f16, false>},
    {rope_kernel<float, true>, rope_kernel<bf16, true>, rope_kernel<f16, true>},
    {norm_rope_kernel<float>, norm_rope_kernel<bf16>, norm_rope_kernel<f16>},
    {norm_rope_backward_kernel<float>, norm_rope_backward_kernel<bf16>, norm_rope_backward_kernel<f16>},
    {widen_kernel<float>, widen_kernel<bf16>, widen_kernel<f16>},
    {narrow_kernel<float>, narrow_kernel<bf16>, narrow_kernel<f16>},
};
}  // namespace sail::cpu::SAIL_ISA
