// Two vectors at a time: 2W elements of a row. Of bf16 they are the even and the odd elements of one load, which a shift
// and a mask widen; W at a time they would need a permute each. Where the order shows, as in sums that stay in lanes
// (vf2 stored as floats), the same loads must have made all of them, and store2 brings the elements back in line.
#pragma once
#include "loop.h"

namespace sail::cpu::SAIL_ISA {
struct vf2 {
  vf a, b;
};
inline vf2 operator+(vf2 x, vf2 y) { return {x.a + y.a, x.b + y.b}; }
inline vf2 operator-(vf2 x, vf2 y) { return {x.a - y.a, x.b - y.b}; }
inline vf2 operator*(vf2 x, vf2 y) { return {x.a * y.a, x.b * y.b}; }
inline vf2 operator*(vf2 x, float y) { return {x.a * y, x.b * y}; }
inline vf2 operator-(vf2 x, float y) { return {x.a - y, x.b - y}; }
inline vf2 fma(vf2 x, vf2 y, vf2 z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
inline vf sum2(vf2 x) { return x.a + x.b; }

template <class T> static inline vf2 load2(const T* p, All) { return {load(p), load(p + W)}; }
template <class T> static inline void store2(T* p, vf2 v, All) { store(p, v.a), store(p + W, v.b); }
static inline vf2 load2(const bf16* p, All) {
  vu u;
  memcpy(&u, p, sizeof u);
  return {reinterpret_cast<vf>(u << 16), reinterpret_cast<vf>(u & 0xffff0000)};
}
#if !defined(__AVX512BF16__)
// bf16 in the upper half of each lane, rounded to even; NaN stays NaN
static inline vu round_bf16(vf v) {
  const vu u = reinterpret_cast<vu>(v);
  return v != v ? u | 0x400000 : u + 0x7fff + ((u >> 16) & 1);
}
#endif
// the 2W bf16 of a pair, in line
static inline vu narrow2(vf2 v) {
#if defined(__AVX512BF16__)
  const __m512i line_up = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vu)_mm512_permutexvar_epi16(line_up, (__m512i)_mm512_cvtne2ps_pbh(v.b, v.a));
#else
  return round_bf16(v.a) >> 16 | (round_bf16(v.b) & 0xffff0000);
#endif
}
static inline void store2(bf16* p, vf2 v, All) {
  const vu u = narrow2(v);
  memcpy(p, &u, sizeof u);
}

// Past the caches, where a result is too large to stay in them: a store then need not read its line first. p must be
// aligned to a pair; fence() before another thread may read.
#if defined(__AVX512F__)
static inline void stream2(float* p, vf2 v, All) { _mm512_stream_ps(p, v.a), _mm512_stream_ps(p + W, v.b); }
static inline void stream2(bf16* p, vf2 v, All) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)narrow2(v));
}
static inline void stream2(f16* p, vf2 v, All) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT;
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v.a, nearest));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p + W), _mm512_cvtps_ph(v.b, nearest));
}
static inline void fence() { _mm_sfence(); }
#else
template <class T> static inline void stream2(T* p, vf2 v, All) { store2(p, v, All{}); }
static inline void fence() {}
#endif
template <class T> static inline vf2 load2(const T* p, Some s) {
  T tmp[2 * W] = {};
  memcpy(tmp, p, s.n * sizeof(T));
  return load2(tmp, All{});
}
template <class T> static inline void store2(T* p, vf2 v, Some s) {
  T tmp[2 * W];
  store2(tmp, v, All{});
  memcpy(p, tmp, s.n * sizeof(T));
}

template <class T> static inline void stream2(T* p, vf2 v, Some s) { store2(p, v, s); }
template <class T, class Lanes> static inline void put2(T* p, vf2 v, Lanes lanes, bool past_caches) {
  if (past_caches)
    stream2(p, v, lanes);
  else
    store2(p, v, lanes);
}

// v as T holds it
template <class T> static inline vf2 rounded(vf2 v) {
  T tmp[2 * W];
  store2(tmp, v, All{});
  return load2(tmp, All{});
}
template <> inline vf2 rounded<float>(vf2 v) { return v; }
template <> inline vf2 rounded<bf16>(vf2 v) {
  const vu u = narrow2(v);
  return {reinterpret_cast<vf>(u << 16), reinterpret_cast<vf>(u & 0xffff0000)};
}

// body(c, lanes) for c = 0, 2W, 4W, ... < n
template <class Body> static inline void for_pairs(int64_t n, Body body) {
  int64_t c = 0;
  for (; c + 2 * W <= n; c += 2 * W) body(c, All{});
  if (c < n) body(c, Some{static_cast<int>(n - c)});
}

// Sum over the row of term(c, lanes, acc), which adds into acc (vf2, or a struct of them with operator+). Two pairs are
// four chains; spans bound the rounding error of rows of any width.
template <class Acc, class Term> static inline Acc sum_pairs(int64_t n, Term term) {
  constexpr int64_t kSpan = 64 * W;
  Acc total = {};
  int64_t c = 0;
  while (c + 2 * W <= n) {
    const int64_t stop = n - c < kSpan ? n : c + kSpan;
    Acc a0 = {}, a1 = {};
    for (; c + 4 * W <= stop; c += 4 * W) {
      term(c, All{}, a0);
      term(c + 2 * W, All{}, a1);
    }
    for (; c + 2 * W <= stop; c += 2 * W) term(c, All{}, a0);
    total = total + (a0 + a1);
  }
  if (c < n) {
    Acc a = {};
    term(c, Some{static_cast<int>(n - c)}, a);
    total = total + a;
  }
  return total;
}
}  // namespace sail::cpu::SAIL_ISA
