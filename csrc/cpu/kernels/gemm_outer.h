// C[M, N] = A[M, K] . B[K, N] and O[M, N] (+)= A[R, M]^T . B[R, N]: outer products into a tile of MR rows x two vectors.
// A group is K_STEP k's of one row or column in four bytes (operand.h); A is packed in groups and broadcast, B is packed
// in panels of two vectors, or, where a single tile uses it, interleaved in registers.
// Measured on Zen 4, bf16, one core: 12x2 tiles reach 211 GFLOP/s at 64 groups, 233 at 1024 (8x2: 213, 4x2: 215).
#pragma once
#include "operand.h"

namespace sail::cpu::SAIL_ISA {
constexpr int kOuterTile = W == 16 ? 12 : 6;  // rows of a tile: 2 x 12 accumulators of 32 registers, or 2 x 6 of 16
constexpr int kPanel = 2 * W;                 // columns of a panel
constexpr int kGroups = 64;                   // groups of a k block: the panel takes 8 KB of the 32 KB first-level cache
constexpr int kGroupStride = kGroups + 16;    // of a packed A row: no power of two, or rows would share cache sets

// One k block's B: packed panel, or rows of the matrix itself.
template <class T> struct PackedB {
  const typename Operand<T>::Group* p;
  void get(int64_t g, typename Operand<T>::Vec b[2]) const {
    b[0] = Operand<T>::load_group(p + g * kPanel);
    b[1] = Operand<T>::load_group(p + g * kPanel + W);
  }
};
template <class T> struct RowsB {
  const T* p;
  int64_t ld;
  void get(int64_t g, typename Operand<T>::Vec b[2]) const {
    const T* row = p + g * Operand<T>::K_STEP * ld;
    Operand<T>::interleave(row, row + ld, kPanel, b);
  }
};

// acc += A . B over `groups`; A's group (row i, g) is a[i * RS + g * gs]
template <class T, int MR, int RS, class B>
static inline void outer_tile(vf acc[MR][2], const typename Operand<T>::Group* a, int64_t gs, B b, int64_t groups) {
  typedef Operand<T> Op;
  for (int64_t g = 0; g < groups; g++) {
    typename Op::Vec bv[2];
    b.get(g, bv);
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++) {
      const typename Op::Vec x = Op::broadcast(a + i * RS + g * gs);
      acc[i][0] = Op::mac(acc[i][0], x, bv[0]);
      acc[i][1] = Op::mac(acc[i][1], x, bv[1]);
    }
  }
}

template <class T, int MR, class B>
static void outer_tile_f32(const typename Operand<T>::Group* a, B b, int64_t groups, bool first, float* c, int64_t ldc,
                           int64_t n) {
  vf acc[MR][2] = {};  // a k block is summed on its own, then added: the error grows with the blocks, not with k
  outer_tile<T, MR, kGroupStride>(acc, a, 1, b, groups);
  for (int i = 0; i < MR; i++)
    for (int64_t j = 0; j * W < n; j++) {
      float* p = c + i * ldc + j * W;
      store_part(p, first ? acc[i][j] : load_part(p, n - j * W) + acc[i][j], n - j * W);
    }
}

template <class T, class B> struct OuterTiles {
  typedef void (*Fn)(const typename Operand<T>::Group*, B, int64_t, bool, float*, int64_t, int64_t);
  static constexpr Fn table[12] = {
      outer_tile_f32<T, 1, B>, outer_tile_f32<T, 2, B>, outer_tile_f32<T, 3, B>, outer_tile_f32<T, 4, B>,
      outer_tile_f32<T, 5, B>, outer_tile_f32<T, 6, B>,
#if defined(__AVX512F__)
      outer_tile_f32<T, 7, B>, outer_tile_f32<T, 8, B>, outer_tile_f32<T, 9, B>, outer_tile_f32<T, 10, B>,
      outer_tile_f32<T, 11, B>, outer_tile_f32<T, 12, B>,
#endif
  };
};

// Packs `groups` groups of a panel: out[g][2W]; rows past K count as zero.
template <class T>
static void pack_panel(const T* b, int64_t ldb, int64_t rows, int64_t n, typename Operand<T>::Group* out) {
  typedef Operand<T> Op;
  for (int64_t r = 0; r < rows; r += Op::K_STEP, out += kPanel) {
    typename Op::Vec v[2];
    Op::interleave(b + r * ldb, r + 1 < rows ? b + (r + 1) * ldb : nullptr, n, v);
    memcpy(out, v, sizeof v);
  }
}

// Packs k0 .. k0 + k of M rows: out[m][kGroupStride], the last group padded with zeros.
static inline void pack_row(const float* a, int64_t k, float* out) { memcpy(out, a, k * sizeof(float)); }
template <class T> static inline void pack_row(const T* a, int64_t k, float* out) {
  for (int64_t i = 0; i < k; i += W) store_part(out + i, load_part(a + i, k - i), k - i);
}
static inline void pack_row(const bf16* a, int64_t k, uint32_t* out) {
  if (k & 1) out[k / 2] = 0;
  memcpy(out, a, k * sizeof(bf16));
}

template <class T> void outer_gemm_kernel(const GemmBlock& g) {
  typedef Operand<T> Op;
  typedef typename Op::Group Group;
  const T* const* a = reinterpret_cast<const T* const*>(g.a_rows);
  const T* b = static_cast<const T*>(g.b);
  Group* a_pack = static_cast<Group*>(g.scratch);
  Group* b_pack = a_pack + kOuterRows * kGroupStride;
  const int64_t tiles = (g.M + kOuterTile - 1) / kOuterTile;
  for (int64_t k0 = 0; k0 < g.K; k0 += kGroups * Op::K_STEP) {
    const bool first = k0 == 0 && !g.accumulate;
    const int64_t k = g.K - k0 < kGroups * Op::K_STEP ? g.K - k0 : kGroups * Op::K_STEP;
    const int64_t groups = (k + Op::K_STEP - 1) / Op::K_STEP;
    for (int64_t m = 0; m < g.M; m++) pack_row(a[m] + k0, k, a_pack + m * kGroupStride);
    for (int64_t n0 = 0; n0 < g.N; n0 += kPanel) {
      const int64_t n = g.N - n0 < kPanel ? g.N - n0 : kPanel;
      const T* panel = b + k0 * g.ldb + n0;
      if (tiles == 1 && n == kPanel && k % Op::K_STEP == 0) {
        OuterTiles<T, RowsB<T>>::table[g.M - 1](a_pack, {panel, g.ldb}, groups, first, g.c + n0, g.ldc, n);
        continue;
      }
      pack_panel(panel, g.ldb, k, n, b_pack);
      for (int64_t t = 0; t < tiles; t++) {  // rows spread evenly: no tile is left with one row
        const int64_t m0 = g.M * t / tiles, m1 = g.M * (t + 1) / tiles;
        OuterTiles<T, PackedB<T>>::table[m1 - m0 - 1](a_pack + m0 * kGroupStride, {b_pack}, groups, first,
                                                       g.c + m0 * g.ldc + n0, g.ldc, n);
      }
    }
  }
}
}  // namespace sail::cpu::SAIL_ISA
