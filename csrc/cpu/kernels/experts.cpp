#include "experts.h"

#include "vec.h"

namespace sail::cpu::SAIL_ISA {
namespace {
// value and derivative of an activation
struct Silu {
  static vf value(vf x) { return x * sigmoid(x); }
  static void both(vf x, vf* y, vf* dy) {
    const vf s = sigmoid(x);
    *y = x * s;
    *dy = s * (1.f + x * (1.f - s));
  }
};
struct Gelu {
  static vf cdf(vf x) {
    vf r;
    for (int i = 0; i < W; i++) r[i] = 0.5f * erfcf(x[i] * -0.70710678f);  // erfc keeps the left tail
    return r;
  }
  static vf value(vf x) { return x * cdf(x); }
  static void both(vf x, vf* y, vf* dy) {
    const vf c = cdf(x);
    *y = x * c;
    *dy = c + x * 0.39894228f * vexp(x * x * -0.5f);
  }
};
struct GeluTanh {
  // 0.5 * (1 + tanh(u)) = sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
  static vf gate(vf x) { return sigmoid(x * (1.5957691f + 0.071354814f * x * x)); }
  static vf value(vf x) { return x * gate(x); }
  static void both(vf x, vf* y, vf* dy) {
    const vf s = gate(x);
    *y = x * s;
    *dy = s + x * s * (1.f - s) * (1.5957691f + 0.21406444f * x * x);
  }
};

template <class T, class Act> void gated_forward_rows(const GatedForward& f) {
  const T *gb = static_cast<const T*>(f.gate_bias), *ub = static_cast<const T*>(f.up_bias);
  T *hg = static_cast<T*>(f.h_gate), *hu = static_cast<T*>(f.h_up), *a = static_cast<T*>(f.a);
  const vf hi = set1(f.clamp), lo = set1(-f.clamp);
  for (int64_t m = 0; m < f.M; m++)
    for (int64_t c = 0; c < f.n; c += W) {
      const int64_t n = f.n - c;
      vf g = load_part(f.gate + m * f.ld + c, n), u = load_part(f.up + m * f.ld + c, n);
      if (gb) g += load_part(gb + c, n), u += load_part(ub + c, n);
      if (hg) store_part(hg + m * f.ldh + c, g, n), store_part(hu + m * f.ldh + c, u, n);
      g = g > hi ? hi : g;  // keeps NaN
      u = u > hi ? hi : u < lo ? lo : u;
      if (a) store_part(a + m * f.lda + c, Act::value(g) * u, n);
    }
}

template <class T, class Act> void gated_backward_rows(const GatedBackward& b) {
  const T *hg = static_cast<const T*>(b.h_gate), *hu = static_cast<const T*>(b.h_up);
  T *dg = static_cast<T*>(b.dh_gate), *du = static_cast<T*>(b.dh_up), *aw = static_cast<T*>(b.a_weighted);
  const vf hi = set1(b.clamp), lo = set1(-b.clamp);
  for (int64_t m = 0; m < b.M; m++) {
    const vf weight = set1(b.weight[m]);
    vf dot = {};
    for (int64_t c = 0; c < b.n; c += W) {
      const int64_t n = b.n - c;
      const vf da = load_part(b.da + m * b.ld + c, n);
      const vf g0 = load_part(hg + m * b.ldh + c, n), u0 = load_part(hu + m * b.ldh + c, n);
      const vf g = g0 > hi ? hi : g0, u = u0 > hi ? hi : u0 < lo ? lo : u0;
      vf act, slope;
      Act::both(g, &act, &slope);
      dot = fma(da, act * u, dot);
      const vf d = da * weight;
      const vf dgate = g0 > hi ? vf{} : d * u * slope, dup = u0 > hi ? vf{} : u0 < lo ? vf{} : d * act;
      store_part(dg + m * b.lddh + c, dgate, n);
      store_part(du + m * b.lddh + c, dup, n);
      store_part(aw + m * b.lda + c, act * u * weight, n);
    }
    b.dot[m] += sum(dot);
  }
}

template <class T> void gated_forward(const GatedForward& f) {
  if (f.activation == Activation::silu) return gated_forward_rows<T, Silu>(f);
  if (f.activation == Activation::gelu) return gated_forward_rows<T, Gelu>(f);
  gated_forward_rows<T, GeluTanh>(f);
}

template <class T> void gated_backward(const GatedBackward& b) {
  if (b.activation == Activation::silu) return gated_backward_rows<T, Silu>(b);
  if (b.activation == Activation::gelu) return gated_backward_rows<T, Gelu>(b);
  gated_backward_rows<T, GeluTanh>(b);
}

template <class T> void store_rows(const StoreRows& s) {
  const T* bias = static_cast<const T*>(s.bias);
  T* out = static_cast<T*>(s.out);
  for (int64_t m = 0; m < s.M; m++) {
    const vf weight = set1(s.weight ? s.weight[m] : 1.f);
    for (int64_t c = 0; c < s.n; c += W) {
      const int64_t n = s.n - c;
      vf v = load_part(s.c + m * s.ldc + c, n);
      if (bias) v += load_part(bias + c, n);
      store_part(out + m * s.ldo + c, v * weight, n);
    }
  }
}

template <class T>
void combine(const void* const* rows, const float* weight, int64_t K, void* out, int64_t n) {
  constexpr int64_t kChain = 16;  // rows added in one chain; chains are added with compensation (Kahan)
  for (int64_t c = 0; c < n; c += W) {
    vf total = {}, lost = {};
    for (int64_t k0 = 0; k0 < K; k0 += kChain) {
      vf acc = {};
      for (int64_t k = k0; k < K && k < k0 + kChain; k++) {
        const vf v = load_part(static_cast<const T*>(rows[k]) + c, n - c);
        acc = weight ? fma(v, set1(weight[k]), acc) : acc + v;
      }
      const vf more = acc - lost, next = total + more;
      lost = (next - total) - more;
      total = next;
    }
    store_part(static_cast<T*>(out) + c, total, n - c);
  }
}

template <class T> float row_dot(const void* a, const void* b, int64_t n) {
  vf acc = {};
  for (int64_t c = 0; c < n; c += W)
    acc = fma(load_part(static_cast<const T*>(a) + c, n - c), load_part(static_cast<const T*>(b) + c, n - c), acc);
  return sum(acc);
}
}  // namespace

extern const ExpertKernels kExperts;
const ExpertKernels kExperts = {
    {gated_forward<float>, gated_forward<bf16>, gated_forward<f16>},
    {gated_backward<float>, gated_backward<bf16>, gated_backward<f16>},
    {store_rows<float>, store_rows<bf16>, store_rows<f16>},
    {combine<float>, combine<bf16>, combine<f16>},
    {row_dot<float>, row_dot<bf16>, row_dot<f16>},
};
}  // namespace sail::cpu::SAIL_ISA
