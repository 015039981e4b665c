// RMSNorm, a row at a time: one pass for the sums, one for the results; the second finds the row in the L1 or L2 cache.
// The backward recomputes 1/rms: it reads x for the dot product anyway, and nothing but x needs to be saved.
#include "norm.h"

#include "loop.h"

namespace sail::cpu::SAIL_ISA {
namespace {
// A column's sum over rows is fp64, in fixed groups of fp32 sums: as exact for a million rows as for one group.
typedef double vd __attribute__((vector_size(8 * W)));
inline vd load(const double* p, All) {
  vd v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline vd load(const double* p, Some s) {
  vd v = {};
  memcpy(&v, p, s.n * sizeof(double));
  return v;
}
inline void add_to(double* p, vf v, All) {
  const vd total = load(p, All{}) + __builtin_convertvector(v, vd);
  memcpy(p, &total, sizeof total);
}
inline void add_to(double* p, vf v, Some s) {
  const vd total = load(p, s) + __builtin_convertvector(v, vd);
  memcpy(p, &total, s.n * sizeof(double));
}

// The few scalars of a row are fp64: free next to the row, and where dx cancels, their rounding would show.
inline double inverse_rms(float sum_of_squares, int64_t D, float eps) {
  return 1 / sqrt(static_cast<double>(sum_of_squares) / static_cast<double>(D) + static_cast<double>(eps));
}

template <class T> void scale_row(const T* x, const T* w, T* y, int64_t D, double inverse) {
  const float r = static_cast<float>(inverse);
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

// N rows: dx = r (w g - x r^2 mean(w g x)) + grad_sum, dweight += sum of g x r, which meets memory once for all N
template <class T, int N> void backward_rows(const RmsNormBackwardRows& in, int first) {
  const T *g[N], *x[N], *grad_sum[N], *w = static_cast<const T*>(in.weight);
  T* dx[N];
  float r[N], mean[N];
  for (int i = 0; i < N; i++) {
    const T* gi = g[i] = static_cast<const T*>(in.grad[first + i]);
    const T* xi = x[i] = static_cast<const T*>(in.x[first + i]);
    grad_sum[i] = static_cast<const T*>(in.grad_sum[first + i]);
    dx[i] = static_cast<T*>(in.dx[first + i]);
    const BackwardSums sums = sum_vectors<BackwardSums>(in.D, [=](int64_t c, auto lanes, BackwardSums& acc) {
      const vf v = load(xi + c, lanes);
      acc.squares = fma(v, v, acc.squares);
      acc.dot = fma(load(w + c, lanes) * load(gi + c, lanes), v, acc.dot);
    });
    const double inverse = inverse_rms(sum(sums.squares), in.D, in.eps), D = static_cast<double>(in.D);
    r[i] = static_cast<float>(inverse);
    mean[i] = static_cast<float>(inverse * inverse * static_cast<double>(sum(sums.dot)) / D);
  }
  const bool need_dx = in.dx[0], add = in.grad_sum[0];
  double* dw = in.dweight;
  for_vectors(in.D, [&](int64_t c, auto lanes) {
    const vf wv = load(w + c, lanes);
    vf term[N];
    for (int i = 0; i < N; i++) {
      const vf gv = load(g[i] + c, lanes), xv = load(x[i] + c, lanes);
      term[i] = gv * (xv * r[i]);
      if (!need_dx) continue;
      vf d = (wv * gv - xv * mean[i]) * r[i];
      if (add) d += load(grad_sum[i] + c, lanes);
      store(dx[i] + c, d, lanes);
    }
    if (!dw) return;
    for (int n = N / 2; n; n /= 2)
      for (int i = 0; i < n; i++) term[i] += term[i + n];
    add_to(dw + c, term[0], lanes);
  });
}

template <class T> void rms_norm_backward_kernel(const RmsNormBackwardRows& in) {
  if (in.rows == kNormGroup) return backward_rows<T, kNormGroup>(in, 0);
  for (int i = 0; i < in.rows; i++) backward_rows<T, 1>(in, i);
}

template <class T> void sum_rows_kernel(const double* partial, int64_t rows, int64_t stride, int64_t n, void* out) {
  for_vectors(n, [=](int64_t c, auto lanes) {
    vd total = {};
    for (int64_t i = 0; i < rows; i++) total += load(partial + i * stride + c, lanes);
    store(static_cast<T*>(out) + c, __builtin_convertvector(total, vf), lanes);
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
