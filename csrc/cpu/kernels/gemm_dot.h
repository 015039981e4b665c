// C[M, N] = A[M, K] . B[N, K]^T in dot-product form: every lane of an accumulator sums its own k's, and one tree adds the
// lanes at the end. B is streamed once, in rows, straight from memory: no packing, which pays from one row to a few hundred.
// Measured on Zen 4, bf16, one core, K = 2048: 4x4 tiles reach 199 GFLOP/s at M = 64 and 188 at M = 8; 4x6 195, 8x3 140.
#pragma once
#include "operand.h"

namespace sail::cpu::SAIL_ISA {
constexpr int kDotRows = W == 16 ? 4 : W == 8 ? 3 : 2;  // accumulators: kDotRows x 4 of the 32 or 16 registers
constexpr int kDotCols = 4;
constexpr int64_t kDotChain = W == 4 ? 128 : 32;  // vectors of a chunk of k

// c[0..3] = lane sums of four accumulators
static inline void sum4(const vf* a, float* c) {
#if defined(__AVX512F__)
  const __m512 s01 = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
  const __m512 s23 = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
  const __m512d d01 = _mm512_castps_pd(s01), d23 = _mm512_castps_pd(s23);
  const __m512 s =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(d01, d23)), _mm512_castpd_ps(_mm512_unpackhi_pd(d01, d23)));
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  _mm_storeu_ps(c, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
#elif defined(__AVX2__)
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  _mm_storeu_ps(c, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
#else
  for (int j = 0; j < 4; j++) c[j] = sum(a[j]);
#endif
}

// acc += one vector of every row along k; `some` as in Operand
template <class T, int PART, int MR, int NR, class... Some>
static inline void dot_step(vf acc[MR][NR], const T* const* a, const T* b, int64_t ldb, int64_t k, Some... some) {
  typedef Operand<T> Op;
  typename Op::Vec x[MR];
#pragma GCC unroll 4
  for (int i = 0; i < MR; i++) x[i] = Op::template part_k<PART>(a[i] + k, some...);
#pragma GCC unroll 4
  for (int j = 0; j < NR; j++) {
    const typename Op::Vec w = Op::template part_k<PART>(b + j * ldb + k, some...);
#pragma GCC unroll 4
    for (int i = 0; i < MR; i++) acc[i][j] = Op::mac(acc[i][j], x[i], w);
  }
}

// C[MR, NR]. AHEAD rows of B from `next` on are prefetched along the way, in the order of their addresses.
template <class T, int MR, int NR, int AHEAD>
static inline void dot_tile(const T* const* a, const T* b, int64_t ldb, int64_t K, const T* next, float* c,
                            int64_t ldc) {
  typedef Operand<T> Op;
  constexpr int64_t kStep = Op::LOAD * Op::PARTS;
  vf acc[MR][NR] = {};
  [[maybe_unused]] vf total[MR][NR] = {};  // narrow vectors: chains of kDotChain are summed on their own
  const int64_t whole = K / kStep * kStep;
  const int64_t chunk = W == 4 || Op::PARTS == 2 ? kDotChain * kStep : whole;
  for (int64_t k0 = 0; k0 < whole; k0 += chunk) {
    const int64_t k1 = whole - k0 < chunk ? whole : k0 + chunk;
    for (int64_t k = k0; k < k1; k += kStep) {
#pragma GCC unroll 4
      for (int j = 0; j < AHEAD; j++) __builtin_prefetch(next + k * AHEAD + j * kStep, 0, 2);
      dot_step<T, 0, MR, NR>(acc, a, b, ldb, k);
    }
    if constexpr (Op::PARTS == 2)  // a loop of its own: both parts of 7 rows beside 12 sums would not fit the registers
      for (int64_t k = k0; k < k1; k += kStep) dot_step<T, 1, MR, NR>(acc, a, b, ldb, k);
    if constexpr (W == 4)
      for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) total[i][j] += acc[i][j], acc[i][j] = vf{};
  }
  if (whole < K) {
    const int some = static_cast<int>(K - whole);
    dot_step<T, 0, MR, NR>(acc, a, b, ldb, whole, some);
    if constexpr (Op::PARTS == 2) dot_step<T, 1, MR, NR>(acc, a, b, ldb, whole, some);
  }
  for (int i = 0; i < MR; i++) {
    if constexpr (W == 4)
      for (int j = 0; j < NR; j++) acc[i][j] += total[i][j];
    if constexpr (NR == 4) {
      sum4(acc[i], c + i * ldc);
    } else {  // the same tree: a column's bits must not depend on where it falls in a block
      static_assert(NR == 1);
      const vf four[4] = {acc[i][0]};
      float sums[4];
      sum4(four, sums);
      c[i * ldc] = sums[0];
    }
  }
}

template <class T, int NR, int AHEAD>
static inline void dot_rows(const T* const* a, int64_t M, const T* b, int64_t ldb, int64_t K, const T* next, float* c,
                            int64_t ldc) {
  if (M == 1) return dot_tile<T, 1, NR, AHEAD>(a, b, ldb, K, next, c, ldc);
  if constexpr (kDotRows >= 2)
    if (M == 2) return dot_tile<T, 2, NR, AHEAD>(a, b, ldb, K, next, c, ldc);
  if constexpr (kDotRows >= 3)
    if (M == 3) return dot_tile<T, 3, NR, AHEAD>(a, b, ldb, K, next, c, ldc);
  if constexpr (kDotRows >= 4) dot_tile<T, 4, NR, AHEAD>(a, b, ldb, K, next, c, ldc);
}

// Rows of B between use and prefetch. Measured on Zen 4 with weights in memory, bf16, one core, GFLOP/s at 8 rows and
// K = 768: 109-114 with 4, 141-169 with 8, 181 with 16; prefetching into the first-level cache instead: 61-69.
constexpr int kDotAhead = 16;

// All rows against NR columns of C. The first tiles share the prefetching of NR rows of B.
template <class T, int NR>
static void dot_columns(const T* const* a, int64_t M, const T* b, int64_t ldb, int64_t K, float* c, int64_t ldc) {
  const int64_t tiles = (M + kDotRows - 1) / kDotRows;
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t m = M * t / tiles, rows = M * (t + 1) / tiles - m;
    const T* next = b + kDotAhead * ldb;
    if (NR < 4 || t >= 4 || (tiles == 3 && t == 2))
      dot_rows<T, NR, 0>(a + m, rows, b, ldb, K, next, c + m * ldc, ldc);
    else if (tiles == 1)
      dot_rows<T, NR, 4>(a + m, rows, b, ldb, K, next, c + m * ldc, ldc);
    else if (tiles < 4)
      dot_rows<T, NR, 2>(a + m, rows, b, ldb, K, next + 2 * t * ldb, c + m * ldc, ldc);
    else
      dot_rows<T, NR, 1>(a + m, rows, b, ldb, K, next + t * ldb, c + m * ldc, ldc);
  }
}

template <class T> void dot_gemm_kernel(const GemmBlock& g) {
  const T* const* a = reinterpret_cast<const T* const*>(g.a_rows);
  const T* b = static_cast<const T*>(g.b);
  int64_t n = 0;
  for (; n + kDotCols <= g.N; n += kDotCols)
    dot_columns<T, kDotCols>(a, g.M, b + n * g.ldb, g.ldb, g.K, g.c + n, g.ldc);
  for (; n < g.N; n++) dot_columns<T, 1>(a, g.M, b + n * g.ldb, g.ldb, g.K, g.c + n, g.ldc);
}
}  // namespace sail::cpu::SAIL_ISA
