// How a product consumes its elements: K_STEP consecutive k's per multiply-accumulate of one fp32 lane.
//   fp32, and bf16 / fp16 without a dot instruction: one k, converted to fp32 when loaded or packed
//   bf16 with AVX-512-BF16: two k's, kept as pairs (vdpbf16ps)
// Where the order along k does not show, PARTS vectors hold every PARTS-th element of PARTS * LOAD: of bf16 the even
// and the odd ones, which a shift and a mask widen; in line, each would need a shuffle across lanes (moe-cpu-widen).
#pragma once
#include "vec.h"

namespace sail::cpu::SAIL_ISA {
// of the odd elements of 2W; 12 sums and 4 operands leave it none of AVX2's 16 registers: it stays in memory
static inline vu odd_mask() {
#if defined(__AVX2__) && !defined(__AVX512F__)
  static const volatile vu mask = vu{} + 0xffff0000;
  return mask;
#else
  return vu{} + 0xffff0000;
#endif
}

template <class T> constexpr int kParts = 1;
template <> inline constexpr int kParts<bf16> = 2;

template <class T> struct Operand {
  typedef vf Vec;       // W lanes of `Group`
  typedef float Group;  // K_STEP k's of one row or column
  static constexpr int K_STEP = 1;
  static constexpr int LOAD = W;  // elements of one load along k
  static constexpr int PARTS = kParts<T>;

  static Vec load_k(const T* p) { return load(p); }
  static Vec load_k(const T* p, int n) { return load_n(p, n); }
  template <int PART> static Vec part_k(const T* p) {
    if constexpr (PARTS == 1) {
      return load(p);
    } else {
      vu u;
      memcpy(&u, p, sizeof u);
      return reinterpret_cast<vf>(PART ? u & odd_mask() : u << 16);
    }
  }
  template <int PART> static Vec part_k(const T* p, int n) {  // the first n < PARTS * LOAD, then zeros
    T some[PARTS * W] = {};
    memcpy(some, p, n * sizeof(T));
    return part_k<PART>(some);
  }
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
  static constexpr int LOAD = 32, PARTS = 1;

  static Vec load_k(const bf16* p) { return (Vec)_mm512_loadu_si512(p); }
  static Vec load_k(const bf16* p, int n) { return (Vec)masked(p, n); }
  template <int> static Vec part_k(const bf16* p) { return load_k(p); }
  template <int> static Vec part_k(const bf16* p, int n) { return load_k(p, n); }
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
