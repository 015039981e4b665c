// C[M, N] = A[M, K] . B[N, K]^T in dot-product form: every lane of an accumulator sums its own k's, and one tree adds the
// lanes at the end. B is streamed once, in rows, straight from memory: no packing, which pays from one row to a few hundred.
// Measured on Zen 4, bf16, one core, K = 2048: 4x4 tiles reach 199 GFLOP/s at M = 64 and 188 at M = 8; 4x6 195, 8x3 140.
#pragma once
#include "operand.h"

namespace sail::cpu::SAIL_ISA {
constexpr int kDotRows = W == 16 ? 4 : W == 8 ? 3 : 2;  // accumulators: kDotRows x 4 of the 32 or 16 registers
constexpr int kDotCols = 4;
constexpr int64_t kDotChain = 128;

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

// AHEAD rows of B from `next` on are prefetched along the way, in the order of their addresses.
template <class T, int MR, int NR, int AHEAD>
static inline void dot_tile(const T* const* a, const T* b, int64_t ldb, int64_t K, const T* next, float* c,
                            int64_t ldc) {
  typedef Operand<T> Op;
  vf acc[MR][NR] = {};
  [[maybe_unused]] vf total[MR][NR] = {};  // narrow vectors: chains of kDotChain are summed on their own
  int64_t k = 0;
  for (; k + Op::LOAD <= K; k += Op::LOAD) {
    typename Op::Vec x[MR];
#pragma GCC unroll 4
    for (int i = 0; i < MR; i++) x[i] = Op::load_k(a[i] + k);
#pragma GCC unroll 4
    for (int j = 0; j < AHEAD; j++) __builtin_prefetch(next + k * AHEAD + j * Op::LOAD, 0, 2);
#pragma GCC unroll 4
    for (int j = 0; j < NR; j++) {
      const typename Op::Vec w = Op::load_k(b + j * ldb + k);
#pragma GCC unroll 4
      for (int i = 0; i < MR; i++) acc[i][j] = Op::mac(acc[i][j], x[i], w);
    }
    if constexpr (W == 4) {
      if (k / Op::LOAD % kDotChain != kDotChain - 1) continue;
      for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) total[i][j] += acc[i][j], acc[i][j] = vf{};
    }
  }
  if (k < K) {
    const int n = static_cast<int>(K - k);
    for (int j = 0; j < NR; j++)
      for (int i = 0; i < MR; i++)
        acc[i][j] = Op::mac(acc[i][j], Op::load_k(a[i] + k, n), Op::load_k(b + j * ldb + k, n));
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
