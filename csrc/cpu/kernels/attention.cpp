#include "attention.h"

#include "attention_backward.h"
#include "attention_forward.h"

namespace sail::cpu::SAIL_ISA {
namespace {
template <class T> void softmax_kernel(const AttentionSoftmax& f) {
  for (int64_t m = 0; m < f.M; m++) {
    float* s = f.s + m * f.N;
    T* p = static_cast<T*>(f.p) + m * f.N;
    const int64_t n = f.visible[m] < f.N ? f.visible[m] : f.N;
    vf most = set1(-INFINITY), total = {};
    for (int64_t c = 0; c < n; c += W) {
      const vf x = load_part(s + c, n - c) * f.scale;
      store_part(s + c, x, n - c);
      most = vmax(most, keep_first(x, n - c < W ? n - c : W, -INFINITY));
    }
    f.max[m] = max_lane(most);
    for (int64_t c = 0; c < f.N; c += W) {
      vf e = {};
      if (c < n) e = keep_first(vexp(load_part(s + c, n - c) - f.max[m]), n - c < W ? n - c : W, 0);
      total += e;
      store_part(p + c, e, f.N - c);
    }
    f.total[m] = sum(total);
  }
}

template <class T> void combine_kernel(const AttentionCombine& f) {
  float most = -INFINITY, total = 0;
  bool seen = false;  // any key; its score may be NaN
  for (int64_t i = 0; i < f.parts; i++) {
    seen = seen || f.total[i * f.step] != 0;
    most = f.max[i * f.step] > most ? f.max[i * f.step] : most;
  }
  if (!seen) return zero_row<T>(f.D, f.out, f.lse);
  for (int64_t i = 0; i < f.parts; i++) total += vexp1(f.max[i * f.step] - most) * f.total[i * f.step];
  for (int64_t d = 0; d < f.D; d += W) {
    vf o = {};
    for (int64_t i = 0; i < f.parts; i++)
      o = fma(load_part(f.o + i * f.o_step + d, f.D - d), set1(vexp1(f.max[i * f.step] - most)), o);
    store_part(static_cast<T*>(f.out) + d, o / total, f.D - d);
  }
  *f.lse = most + logf(total);
}

template <class T>
void sum_parts_kernel(const float* rows, int64_t parts, int64_t step, int64_t n, float scale, void* out) {
  for (int64_t c = 0; c < n; c += W) {
    vf total = {};
    for (int64_t i = 0; i < parts; i++) total += load_part(rows + i * step + c, n - c);
    store_part(static_cast<T*>(out) + c, total * scale, n - c);
  }
}
}  // namespace

extern const AttentionKernels kAttention;
const AttentionKernels kAttention = {
    {kBlock<float>, kBlock<bf16>, kBlock<f16>},
    {pack_transposed_kernel<float>, pack_transposed_kernel<bf16>, pack_transposed_kernel<f16>},
    {pack_rows_kernel<float>, pack_rows_kernel<bf16>, pack_rows_kernel<f16>},
    {attention_forward_kernel<float>, attention_forward_kernel<bf16>, attention_forward_kernel<f16>},
    {attention_backward_kernel<float>, attention_backward_kernel<bf16>, attention_backward_kernel<f16>},
    {softmax_kernel<float>, softmax_kernel<bf16>, softmax_kernel<f16>},
    {combine_kernel<float>, combine_kernel<bf16>, combine_kernel<f16>},
    {sum_parts_kernel<float>, sum_parts_kernel<bf16>, sum_parts_kernel<f16>},
};
}  // namespace sail::cpu::SAIL_ISA
