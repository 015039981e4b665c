// Softmax down the columns of [V, T]. The statistics take a span of rows twice, the second time from the first-level
// cache: its maxima first, so that an element costs one exp and the running sums are rescaled once a span.
#include "loss.h"

#include "loop.h"

namespace sail::cpu::SAIL_ISA {
namespace {
constexpr int64_t kSpan = 32;  // rows

template <class T>
void softmax_statistics_kernel(const void* lp, int64_t rows, int64_t n, float* max, float* sum) {
  const T* logits = static_cast<const T*>(lp);
  for_vectors(n, [=](int64_t c, auto lanes) {
    store(max + c, set1(-3.40282347e38f), lanes);  // finite: a column of -inf gives sums of 0, not of exp(nan)
    store(sum + c, vf{}, lanes);
  });
  for (int64_t r = 0; r < rows; r += kSpan) {
    const int64_t stop = rows - r < kSpan ? rows : r + kSpan;
    for_vectors(n, [=](int64_t c, auto lanes) {
      const vf before = load(max + c, lanes);
      vf m = before, s = {};
      for (int64_t v = r; v < stop; v++) m = vmax(m, load(logits + v * n + c, lanes));
      for (int64_t v = r; v < stop; v++) s += vexp(load(logits + v * n + c, lanes) - m);
      store(sum + c, fma(load(sum + c, lanes), vexp(before - m), s), lanes);
      store(max + c, m, lanes);
    });
  }
}

template <class T>
void softmax_gradient_kernel(void* lp, int64_t rows, int64_t n, const float* shift, const float* factor) {
  for (int64_t v = 0; v < rows; v++) {
    T* row = static_cast<T*>(lp) + v * n;
    for_vectors(n, [=](int64_t c, auto lanes) {
      store(row + c, vexp(load(row + c, lanes) - load(shift + c, lanes)) * load(factor + c, lanes), lanes);
    });
  }
}

template <class T> void store_kernel(void* out, int64_t at, float value) {
  from_float(value, static_cast<T*>(out) + at);
}
}  // namespace

const LossKernels kLoss = {
    {softmax_statistics_kernel<float>, softmax_statistics_kernel<bf16>, softmax_statistics_kernel<f16>},
    {softmax_gradient_kernel<float>, softmax_gradient_kernel<bf16>, softmax_gradient_kernel<f16>},
    {store_kernel<float>, store_kernel<bf16>, store_kernel<f16>},
};
}  // namespace sail::cpu::SAIL_ISA
