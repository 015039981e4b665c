// RMSNorm, a row at a time: one pass for the sums, one for the results; the second finds the row in the L1 or L2 cache.
// The backward recomputes 1/rms: it reads x for the dot product anyway, and nothing but x needs to be saved.
#include "norm.h"

#include "loop.h"

namespace sail::cpu::SAIL_ISA {
namespace {
inline float inverse_rms(float sum_of_squares, int64_t D, float eps) {
  return 1.f / sqrtf(sum_of_squares / static_cast<float>(D) + eps);
}

template <class T> void scale_row(const T* x, const T* w, T* y, int64_t D, float r) {
  for_vectors(D, [=](int64_t c, auto lanes) { store(y + c, load(x + c, lanes) * r * load(w + c, lanes), lanes); });
}

template <class T> void rms_norm_kernel(const void* xp, const void* wp, void* yp, int64_t D, float eps) {
  const T* x = static_cast<const T*>(xp);
  const vf squares = sum_vectors<vf>(D, [=](int64_t c, auto lanes, vf& acc) {
    const vf v = load(x + c, lanes);
    acc = fma(v, v, acc);
  });
  scale_row(x, static_cast<const T*>(wp), static_cast<T*>(yp), D, inverse_rms(sum(squares), D, eps));
}

template <class T>
void add_rms_norm_kernel(const void* xp, const void* rp, const void* wp, void* yp, void* sp, int64_t D, float eps) {
  const T *x = static_cast<const T*>(xp), *residual = static_cast<const T*>(rp);
  T* s = static_cast<T*>(sp);
  const vf squares = sum_vectors<vf>(D, [=](int64_t c, auto lanes, vf& acc) {
    store(s + c, load(x + c, lanes) + load(residual + c, lanes), lanes);
    const vf v = load(s + c, lanes);  // rounded, as the backward will see it
    acc = fma(v, v, acc);
  });
  scale_row(s, static_cast<const T*>(wp), static_cast<T*>(yp), D, inverse_rms(sum(squares), D, eps));
}

struct BackwardSums {
  vf squares, dot;
};
inline BackwardSums operator+(BackwardSums a, BackwardSums b) { return {a.squares + b.squares, a.dot + b.dot}; }

// dx = r (w g - x r^2 mean(w g x)) + grad_sum, dweight += g x r
template <class T> void rms_norm_backward_kernel(const RmsNormBackwardRow& row) {
  const T *g = static_cast<const T*>(row.grad), *x = static_cast<const T*>(row.x);
  const T *w = static_cast<const T*>(row.weight), *grad_sum = static_cast<const T*>(row.grad_sum);
  const BackwardSums sums = sum_vectors<BackwardSums>(row.D, [=](int64_t c, auto lanes, BackwardSums& acc) {
    const vf v = load(x + c, lanes);
    acc.squares = fma(v, v, acc.squares);
    acc.dot = fma(load(w + c, lanes) * load(g + c, lanes), v, acc.dot);
  });
  const float r = inverse_rms(sum(sums.squares), row.D, row.eps);
  if (float* dw = row.dweight)
    for_vectors(row.D, [=](int64_t c, auto lanes) {
      store(dw + c, fma(load(g + c, lanes), load(x + c, lanes) * r, load(dw + c, lanes)), lanes);
    });
  T* dx = static_cast<T*>(row.dx);
  if (!dx) return;
  const float mean = r * r * (sum(sums.dot) / static_cast<float>(row.D));
  const auto gradient = [=](int64_t c, auto lanes) {
    return (load(w + c, lanes) * load(g + c, lanes) - load(x + c, lanes) * mean) * r;
  };
  if (grad_sum)
    for_vectors(row.D,
                [=](int64_t c, auto lanes) { store(dx + c, gradient(c, lanes) + load(grad_sum + c, lanes), lanes); });
  else
    for_vectors(row.D, [=](int64_t c, auto lanes) { store(dx + c, gradient(c, lanes), lanes); });
}

// Two levels, 64 rows each: the rounding error grows with the square root of 64, not of all rows.
template <class T> void sum_rows_kernel(const float* partial, int64_t rows, int64_t stride, int64_t n, void* out) {
  for_vectors(n, [=](int64_t c, auto lanes) {
    vf total = {};
    for (int64_t start = 0; start < rows; start += 64) {
      vf acc = {};
      for (int64_t i = start; i < rows && i < start + 64; i++) acc += load(partial + i * stride + c, lanes);
      total += acc;
    }
    store(static_cast<T*>(out) + c, total, lanes);
  });
}
}  // namespace

const NormKernels kNorm = {
    {rms_norm_kernel<float>, rms_norm_kernel<bf16>, rms_norm_kernel<f16>},
    {add_rms_norm_kernel<float>, add_rms_norm_kernel<bf16>, add_rms_norm_kernel<f16>},
    {rms_norm_backward_kernel<float>, rms_norm_backward_kernel<bf16>, rms_norm_backward_kernel<f16>},
    {sum_rows_kernel<float>, sum_rows_kernel<bf16>, sum_rows_kernel<f16>},
};
}  // namespace sail::cpu::SAIL_ISA
