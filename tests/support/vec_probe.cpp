// The functions of vec.h over arrays, for tests/ops/test_vec.py. Compiled once per instruction set, with the build's flags.
#include "vec.h"

#define SAIL_PROBE extern "C" __attribute__((visibility("default"))) void
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

SAIL_PROBE probe_widen_bf16(const uint16_t* in, float* whole, float* part, float* scalar, int64_t n) {
  widen<bf16>(in, whole, part, scalar, n);
}
SAIL_PROBE probe_widen_f16(const uint16_t* in, float* whole, float* part, float* scalar, int64_t n) {
  widen<f16>(in, whole, part, scalar, n);
}
SAIL_PROBE probe_narrow_bf16(const float* in, uint16_t* whole, uint16_t* scalar, int64_t n) {
  narrow<bf16>(in, whole, scalar, n);
}
SAIL_PROBE probe_narrow_f16(const float* in, uint16_t* whole, uint16_t* scalar, int64_t n) {
  narrow<f16>(in, whole, scalar, n);
}
SAIL_PROBE probe_exp(const float* in, float* out, int64_t n) {
  for (int64_t c = 0; c < n; c += W) store(out + c, vexp(load(in + c)));
}
SAIL_PROBE probe_sum(const float* in, float* out) { *out = sum(load(in)); }
SAIL_PROBE probe_edges(const float* in, float* out, int64_t n) {  // n <= W elements in and out, nothing beyond
  store_n(out, load_n(in, static_cast<int>(n)), static_cast<int>(n));
}
extern "C" __attribute__((visibility("default"))) int probe_width() { return W; }
