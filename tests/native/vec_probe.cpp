// The functions of vec.h over arrays, for tests/ops/test_vec.py. Compiled once per instruction set, with the build's flags.
#include "vec_calls.h"

#include "vec.h"

using namespace sail::cpu;
using namespace sail::cpu::SAIL_ISA;

template <class T> static void widen(const uint16_t* in, float* whole, float* part, float* scalar, int64_t n) {
  const T* x = reinterpret_cast<const T*>(in);
  for (int64_t c = 0; c < n; c += W) store(whole + c, load(x + c));
  for (int64_t c = 0; c < n; c += W) store_part(part + c, load_part(x + c, n - c < W - 1 ? n - c : W - 1), n - c);
  for (int64_t i = 0; i < n; i++) scalar[i] = to_float(x[i]);
}
template <class T> static void narrow(const float* in, uint16_t* whole, uint16_t* scalar, int64_t n) {
  for (int64_t c = 0; c < n; c += W) store(reinterpret_cast<T*>(whole) + c, load(in + c));
  for (int64_t i = 0; i < n; i++) from_float(in[i], reinterpret_cast<T*>(scalar) + i);
}

int64_t width() { return W; }
void widen_bf16(const uint16_t* in, float* whole, float* part, float* scalar, int64_t n) {
  widen<bf16>(in, whole, part, scalar, n);
}
void widen_f16(const uint16_t* in, float* whole, float* part, float* scalar, int64_t n) {
  widen<f16>(in, whole, part, scalar, n);
}
void narrow_bf16(const float* in, uint16_t* whole, uint16_t* scalar, int64_t n) { narrow<bf16>(in, whole, scalar, n); }
void narrow_f16(const float* in, uint16_t* whole, uint16_t* scalar, int64_t n) { narrow<f16>(in, whole, scalar, n); }
void exponential(const float* in, float* out, int64_t n) {
  for (int64_t c = 0; c < n; c += W) store(out + c, vexp(load(in + c)));
}
void total(const float* in, float* out) { *out = sum(load(in)); }
void copy_n(const float* in, float* out, int64_t n) {
  store_n(out, load_n(in, static_cast<int>(n)), static_cast<int>(n));
}
