// How a product consumes its elements: K_STEP consecutive k's per multiply-accumulate of one fp32 lane.
//   fp32, and bf16 / fp16 without a dot instruction: one k, converted to fp32 when loaded or packed
//   bf16 with AVX-512-BF16: two k's, kept as pairs (vdpbf16ps)
#pragma once
#include "vec.h"

namespace sail::cpu::SAIL_ISA {
template <class T> struct Operand {
  typedef vf Vec;       // W lanes of `Group`
  typedef float Group;  // K_STEP k's of one row or column
  static constexpr int K_STEP = 1;
  static constexpr int LOAD = W;  // elements of one load along k

  static Vec load_k(const T* p) { return load(p); }
  static Vec load_k(const T* p, int n) { return load_n(p, n); }
  static Vec load_group(const Group* p) { return load(p); }
  static Vec broadcast(const Group* p) { return set1(*p); }
  static vf mac(vf acc, Vec a, Vec b) { return fma(a, b, acc); }

  // [K_STEP rows][2W columns] of a row-major matrix as two vectors of groups; n columns are there, missing rows are
  // null
  static void interleave(const T* row, const T*, int64_t n, Vec out[2]) {
    out[0] = load_part(row, n);
    out[1] = n > W ? load_part(row + W, n - W) : vf{};
  }
};

#if defined(__AVX512BF16__)
template <> struct Operand<bf16> {
  typedef __m512bh Vec;
  typedef uint32_t Group;
  static constexpr int K_STEP = 2;
  static constexpr int LOAD = 32;

  static Vec load_k(const bf16* p) { return (Vec)_mm512_loadu_si512(p); }
  static Vec load_k(const bf16* p, int n) { return (Vec)masked(p, n); }
  static Vec load_group(const Group* p) { return (Vec)_mm512_loadu_si512(p); }
  static Vec broadcast(const Group* p) { return (Vec)_mm512_set1_epi32((int)*p); }
  static vf mac(vf acc, Vec a, Vec b) { return _mm512_dpbf16_ps(acc, a, b); }

  static void interleave(const bf16* row0, const bf16* row1, int64_t n, Vec out[2]) {
    const __m512i r0 = n >= 32 ? _mm512_loadu_si512(row0) : masked(row0, (int)n);
    const __m512i r1 = !row1 ? _mm512_setzero_si512() : n >= 32 ? _mm512_loadu_si512(row1) : masked(row1, (int)n);
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    out[0] = (Vec)_mm512_permutex2var_epi16(r0, low, r1);
    out[1] = (Vec)_mm512_permutex2var_epi16(r0, high, r1);
  }

 private:
  static __m512i masked(const bf16* p, int n) { return _mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p); }
};
#endif
}  // namespace sail::cpu::SAIL_ISA
