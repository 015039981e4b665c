// RMSNorm and LayerNorm, a row at a time: a pass for the sums, and one for the results, which finds the row in the L1 or
// L2 cache and meanwhile asks for the row behind it. LayerNorm sums what a guess of the mean leaves of the row, and its
// squares: no cancellation.
// The backward recomputes mean and 1/rms: it reads x anyway, and nothing but x needs to be saved.
#include "norm.h"

#include "pairs.h"

namespace sail::cpu::SAIL_ISA {
namespace {
// The few scalars of a row are fp64: free next to the row, and where dx cancels, their rounding would show.
inline double mean_of(vf2 total, int64_t D) { return static_cast<double>(sum(sum2(total))) / static_cast<double>(D); }
inline double inverse_sqrt(double variance, float eps) { return 1 / sqrt(variance + static_cast<double>(eps)); }

// A row of x, or of x + residual as the backward will see it: rounded, and added anew in each pass rather than read back.
template <class T, bool ADD> struct Input {
  const T *x, *residual;
  template <class Lanes> vf2 operator()(int64_t c, Lanes lanes) const {
    const vf2 v = load2(x + c, lanes);
    return ADD ? rounded<T>(v + load2(residual + c, lanes)) : v;
  }
  void prefetch_row(int64_t c) const {
    prefetch(x + c, 2 * W);
    if (ADD) prefetch(residual + c, 2 * W);
  }
};

template <class Row> double mean_of_row(Row row, int64_t D) {
  return mean_of(sum_pairs<vf2>(D, [=](int64_t c, auto lanes, vf2& acc) { acc = acc + row(c, lanes); }), D);
}

// 1 in the lanes within the row, 0 past its end
template <class T> inline vf2 within(Some s) {
  T ones[2 * W] = {};
  for (int i = 0; i < s.n; i++) from_float(1, ones + i);
  return load2(ones, All{});
}
template <class T> inline vf2 centered(vf2 v, float mean, All) { return v - mean; }
template <class T> inline vf2 centered(vf2 v, float mean, Some s) { return (v - mean) * within<T>(s); }

// pass(guess): sums of x - guess, `rest`, and of its squares, for LayerNorm. The mean of the first columns is the guess;
// where the sums tell that it is more than a quarter of the deviation off, taking rest^2 off the squares would cost bits,
// and the row is summed again about the mean they tell. RMSNorm's are those of x.
constexpr int64_t kGuess = 256;
template <bool LAYER, class Row, class Pass> auto sums_about(Row row, int64_t D, float* guess, Pass pass) {
  *guess = LAYER ? static_cast<float>(mean_of_row(row, D < kGuess ? D : kGuess)) : 0.f;
  auto sums = pass(*guess);
  const double rest = mean_of(sums.rest, D);
  if (LAYER && 17 * rest * rest > mean_of(sums.squares, D)) sums = pass(*guess = static_cast<float>(*guess + rest));
  return sums;
}
// The mean in two floats
inline void split_double(double mean, float* high, float* low) {
  *high = static_cast<float>(mean), *low = static_cast<float>(mean - *high);
}

struct RowSums {
  vf2 squares, rest;
};
inline RowSums operator+(RowSums a, RowSums b) { return {a.squares + b.squares, a.rest + b.rest}; }

template <class T, bool LAYER, bool ADD> void norm_row(const NormRow& in) {
  const Input<T, ADD> row = {static_cast<const T*>(in.x), static_cast<const T*>(in.residual)};
  const T *w = static_cast<const T*>(in.weight), *bias = static_cast<const T*>(in.bias);
  T *y = static_cast<T*>(in.y), *total = static_cast<T*>(in.sum);
  float mean, d;
  const RowSums sums = sums_about<LAYER>(row, in.D, &mean, [=](float guess) {
    return sum_pairs<RowSums>(in.D, [=](int64_t c, auto lanes, RowSums& acc) {
      const vf2 v = LAYER ? centered<T>(row(c, lanes), guess, lanes) : row(c, lanes);
      acc.squares = fma(v, v, acc.squares);
      if (LAYER) acc.rest = acc.rest + v;
    });
  });
  const double rest = mean_of(sums.rest, in.D);
  const float r = static_cast<float>(inverse_sqrt(mean_of(sums.squares, in.D) - rest * rest, in.eps));
  split_double(mean + rest, &mean, &d);
  for_pairs(in.D, [=](int64_t c, auto lanes) {
    row.prefetch_row(in.D + c);
    const vf2 v = row(c, lanes), scaled = (LAYER ? v - mean - d : v) * r * load2(w + c, lanes);
    if (ADD) store2(total + c, v, lanes);
    store2(y + c, LAYER && bias ? scaled + load2(bias + c, lanes) : scaled, lanes);
  });
}

template <class T, bool LAYER> void norm_kernel(const NormRow& in) {
  in.residual ? norm_row<T, LAYER, true>(in) : norm_row<T, LAYER, false>(in);
}

struct BackwardSums {
  vf2 squares, rest, dot, grad;
};
inline BackwardSums operator+(BackwardSums a, BackwardSums b) {
  return {a.squares + b.squares, a.rest + b.rest, a.dot + b.dot, a.grad + b.grad};
}

// N rows, with v = x - mean (LayerNorm) or x, r = 1/rms(v):
// dx = r (w g - mean(w g) - v r^2 mean(w g v)) + grad_sum, where RMSNorm has no mean(w g); dweight += sum of g v r,
// dbias += sum of g, which meet memory once for all N
template <class T, bool LAYER, int N> void backward_rows(const NormBackwardRows& in, int first) {
  const T *g[N], *x[N], *grad_sum[N], *w = static_cast<const T*>(in.weight);
  T* dx[N];
  float r[N], mean[N], rest[N], mean_wg[N], dot[N];
  for (int i = 0; i < N; i++) {
    const T* gi = g[i] = static_cast<const T*>(in.grad[first + i]);
    const T* xi = x[i] = static_cast<const T*>(in.x[first + i]);
    grad_sum[i] = static_cast<const T*>(in.grad_sum[first + i]);
    dx[i] = static_cast<T*>(in.dx[first + i]);
    const Input<T, false> row = {xi, nullptr};
    const BackwardSums sums = sums_about<LAYER>(row, in.D, &mean[i], [=](float guess) {
      return sum_pairs<BackwardSums>(in.D, [=](int64_t c, auto lanes, BackwardSums& acc) {
        const vf2 v = LAYER ? centered<T>(row(c, lanes), guess, lanes) : row(c, lanes);
        const vf2 wg = load2(w + c, lanes) * load2(gi + c, lanes);
        acc.squares = fma(v, v, acc.squares);
        acc.dot = fma(wg, v, acc.dot);
        if (LAYER) acc.rest = acc.rest + v, acc.grad = acc.grad + wg;
      });
    });
    const double left = mean_of(sums.rest, in.D), wg = mean_of(sums.grad, in.D);
    const double inverse = inverse_sqrt(mean_of(sums.squares, in.D) - left * left, in.eps);
    r[i] = static_cast<float>(inverse), split_double(mean[i] + left, &mean[i], &rest[i]);
    dot[i] = static_cast<float>(inverse * inverse * (mean_of(sums.dot, in.D) - left * wg));
    mean_wg[i] = static_cast<float>(wg);
  }
  const bool need_dx = in.dx[0], add = in.grad_sum[0];
  float *dw = in.dweight, *db = in.dbias;
  for_pairs(in.D, [&](int64_t c, auto lanes) {
    const vf2 wv = load2(w + c, lanes);
    vf2 term[N], grads[N];
    for (int i = 0; i < N; i++) {
      prefetch(x[i] + N * in.D + c, 2 * W), prefetch(g[i] + N * in.D + c, 2 * W);
      const vf2 gv = grads[i] = load2(g[i] + c, lanes), xv = load2(x[i] + c, lanes),
                v = LAYER ? xv - mean[i] - rest[i] : xv;
      term[i] = gv * (v * r[i]);
      if (!need_dx) continue;
      vf2 d = wv * gv - v * dot[i];
      d = (LAYER ? d - mean_wg[i] : d) * r[i];
      if (add) d = d + load2(grad_sum[i] + c, lanes);
      put2(dx[i] + c, d, lanes, in.stream);
    }
    for (int n = N / 2; n; n /= 2)
      for (int i = 0; i < n; i++) term[i] = term[i] + term[i + n], grads[i] = grads[i] + grads[i + n];
    if (dw) store2(dw + c, load2(dw + c, All{}) + term[0], All{});
    if (LAYER && db) store2(db + c, load2(db + c, All{}) + grads[0], All{});
  });
}

template <class T, bool LAYER> void backward_kernel(const NormBackwardRows& in) {
  if (in.rows == kNormGroup)
    backward_rows<T, LAYER, kNormGroup>(in, 0);
  else
    for (int i = 0; i < in.rows; i++) backward_rows<T, LAYER, 1>(in, i);
  if (in.stream) fence();
}

// In fp64: as exact for a million rows as for one.
template <class T> void sum_rows_kernel(const float* partial, int64_t rows, int64_t stride, int64_t n, void* out) {
  typedef double vd __attribute__((vector_size(8 * W)));
  for_pairs(n, [=](int64_t c, auto lanes) {
    vd a = {}, b = {};
    for (int64_t i = 0; i < rows; i++) {
      const vf2 v = load2(partial + i * stride + c, All{});
      a += __builtin_convertvector(v.a, vd), b += __builtin_convertvector(v.b, vd);
    }
    store2(static_cast<T*>(out) + c, {__builtin_convertvector(a, vf), __builtin_convertvector(b, vf)}, lanes);
  });
}
}  // namespace

const NormKernels kNorm = {
    {norm_kernel<float, false>, norm_kernel<bf16, false>, norm_kernel<f16, false>},
    {norm_kernel<float, true>, norm_kernel<bf16, true>, norm_kernel<f16, true>},
    {backward_kernel<float, false>, backward_kernel<bf16, false>, backward_kernel<f16, false>},
    {backward_kernel<float, true>, backward_kernel<bf16, true>, backward_kernel<f16, true>},
    {sum_rows_kernel<float>, sum_rows_kernel<bf16>, sum_rows_kernel<f16>},
};
}  // namespace sail::cpu::SAIL_ISA
