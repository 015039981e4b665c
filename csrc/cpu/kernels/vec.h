// One vector of floats, as wide as the instruction set this file is compiled for, and the element types.
// Included by kernel sources only: everything here is static, inside the ISA's namespace, and instantiates nothing of
// std (the linker merges such functions across objects, and a copy built for AVX-512 could then run on an older CPU).
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "elements.h"

#ifndef SAIL_ISA
#error "compile with -DSAIL_ISA=<namespace>"
#endif

namespace sail::cpu::SAIL_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

static inline vf set1(float x) { return x - vf{}; }
static inline vf vmax(vf a, vf b) { return a > b ? a : b; }
static inline vf vmin(vf a, vf b) { return a < b ? a : b; }
// a * b + c: one rounding where the instruction set has FMA (-ffp-contract=fast)
static inline vf fma(vf a, vf b, vf c) { return a * b + c; }

// ---- scalar conversions
static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) { return bf16_to_float(x.bits); }
static inline float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  return f16_to_float(x.bits);
#endif
}
static inline void from_float(float x, float* out) { *out = x; }
static inline void from_float(float x, bf16* out) {
  uint32_t u;
  memcpy(&u, &x, 4);
  out->bits = static_cast<uint16_t>(x != x ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline void from_float(float x, f16* out) {
#if defined(__F16C__)
  out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t sign = u >> 16 & 0x8000, mag = u & 0x7fffffff;
  if (mag > 0x7f800000) {
    out->bits = static_cast<uint16_t>(sign | 0x7e00);
  } else if (mag >= 0x477ff000) {  // rounds past 65504
    out->bits = static_cast<uint16_t>(sign | 0x7c00);
  } else if (mag < 0x38800000) {  // subnormal: let the adder round at 2^-24
    float f;
    memcpy(&f, &mag, 4);
    f += 0.5f;
    memcpy(&u, &f, 4);
    out->bits = static_cast<uint16_t>(sign | (u - 0x3f000000));
  } else {
    out->bits = static_cast<uint16_t>(sign | ((mag + 0xfff + (mag >> 13 & 1) - 0x38000000) >> 13));
  }
#endif
}

// ---- whole vectors, any alignment
static inline vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline vf load(const bf16* p) {
#if defined(__AVX512F__)  // GCC 12 makes three instructions more of __builtin_convertvector
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
#elif defined(__AVX2__)
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
#else
  vh h;
  memcpy(&h, p, sizeof h);
  return reinterpret_cast<vf>(__builtin_convertvector(h, vu) << 16);
#endif
}
static inline vf load(const f16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf v;
  for (int i = 0; i < W; i++) v[i] = to_float(p[i]);
  return v;
#endif
}
static inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
static inline void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh(v);
  memcpy(p, &h, sizeof h);
#else
  const vu u = reinterpret_cast<vu>(v);
  const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, quiet = (u >> 16) | 0x40;
  const vh h = __builtin_convertvector(v != v ? quiet : rounded, vh);
  memcpy(p, &h, sizeof h);
#endif
}
static inline void store(f16* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; i++) from_float(v[i], p + i);
#endif
}

// ---- the first n < W elements; the other lanes load as zero and are not stored
template <class T> static inline vf load_n(const T* p, int n) {
  T tmp[W] = {};
  memcpy(tmp, p, n * sizeof(T));
  return load(tmp);
}
template <class T> static inline void store_n(T* p, vf v, int n) {
  T tmp[W];
  store(tmp, v);
  memcpy(p, tmp, n * sizeof(T));
}

// for (c = 0; c < n; c += W) body(c, lanes): the last step may be short
template <class T> static inline vf load_part(const T* p, int64_t n) { return n >= W ? load(p) : load_n(p, (int)n); }
template <class T> static inline void store_part(T* p, vf v, int64_t n) {
  if (n >= W)
    store(p, v);
  else
    store_n(p, v, (int)n);
}

static inline float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float t[W], s = 0;
  memcpy(t, &v, sizeof v);
  for (int w = W / 2; w; w /= 2)
    for (int i = 0; i < w; i++) t[i] += t[i + w];
  s = t[0];
  return s;
#endif
}

// exp(x), about 1 ulp; NaN for NaN, inf above 88.7, 0 below -87.3 (with AVX-512: subnormal down to -103.9).
// Cody-Waite reduction by n = round(x / ln 2), degree-6 polynomial, times 2^n.
static inline vf vexp(vf x) {
#if defined(__AVX512F__)
  // min and max return their second operand where one is NaN
  const vf xc = _mm512_max_ps(set1(-104.f), _mm512_min_ps(set1(89.f), x));
#else
  const vf hi = set1(88.72283f), lo = set1(-87.33654f);
  const vf xc = vmax(vmin(x, hi), lo);
#endif
  const vf magic = set1(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = fma(xc, set1(1.44269504f), magic) - magic;
  vf r = fma(n, set1(-0.693359375f), xc);
  r = fma(n, set1(2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.f;
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);  // overflows to inf, underflows to 0
#else
  // 2^n in two factors, so that n = 128 does not overflow
  const vi ni = __builtin_convertvector(n, vi), half = ni >> 1, rest = ni - half;
  p = p * reinterpret_cast<vf>((half + 127) << 23) * reinterpret_cast<vf>((rest + 127) << 23);
  p = x < lo ? vf{} : p;
  p = x > hi ? set1(INFINITY) : p;
  return x != x ? x : p;
#endif
}

static inline vf sigmoid(vf x) { return 1.f / (1.f + vexp(-x)); }
// The same, with 1/d from its estimate and a Newton step where no lane's is near overflow: 1 ulp, a third of the time
// of the division.
static inline vf fast_sigmoid(vf x) {
#if defined(__AVX512F__)
  const vf d = 1.f + vexp(-x);
  if (_mm512_cmp_ps_mask(d, set1(1e30f), _CMP_NLT_UQ)) return 1.f / d;
  const vf r = _mm512_rcp14_ps(d);
  return fma(fma(-d, r, set1(1.f)), r, r);
#else
  return sigmoid(x);
#endif
}
}  // namespace sail::cpu::SAIL_ISA
