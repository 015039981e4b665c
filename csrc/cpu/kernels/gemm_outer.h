// C[M, N] = A[M, K] . B[K, N] and O[M, N] (+)= A[R, M]^T . B[R, N]: outer products into a tile of MR rows x two vectors.
// A group is K_STEP k's of one row or column in four bytes (operand.h). A is packed in groups and broadcast; B, read in
// panels of two vectors, is interleaved in registers as often as a tile needs it.
// Measured on Zen 4, bf16, one core: 12x2 tiles reach 211 GFLOP/s at 64 groups, 233 at 1024 (8x2: 213, 4x2: 215). Packing
// B's panels into the first-level cache is slower at every number of rows: 32 rows of weights from memory 145-160 instead
// of 165-188, 64 rows 162-174 instead of 170-190.
#pragma once
#include "operand.h"

namespace sail::cpu::SAIL_ISA {
constexpr int kOuterTile = W == 16 ? 12 : 6;  // rows of a tile: 2 x 12 accumulators of 32 registers, or 2 x 6 of 16
constexpr int kPanel = 2 * W;                 // columns of a panel
constexpr int kGroups = 64;                   // groups of a k block: its fp32 sums start anew
constexpr int kGroupStride = kGroups + 16;    // of a packed A row: no power of two, or rows would share cache sets

// Where a tile's B comes from: a packed panel, or the rows of the matrix (FULL: all columns and both rows of a pair exist).
template <class T> struct PackedB {
  static constexpr bool packed = true;
  const typename Operand<T>::Group* p;
  void get(int64_t g, typename Operand<T>::Vec b[2]) const {
    b[0] = Operand<T>::load_group(p + g * kPanel);
    b[1] = Operand<T>::load_group(p + g * kPanel + W);
  }
};
template <class T, bool FULL> struct RowsB {
  static constexpr bool packed = false;
  const T* p;
  int64_t ld, rows, columns;
  void get(int64_t g, typename Operand<T>::Vec b[2]) const {
    const int64_t r = g * Operand<T>::K_STEP;
    const T* row = p + r * ld;
    Operand<T>::interleave(row, FULL || r + 1 < rows ? row + ld : nullptr, FULL ? kPanel : columns, b);
  }
};

// Rows of B to prefetch, K_STEP a group: a panel is one cache line wide, which the hardware's prefetcher cannot follow.
template <class T> struct Ahead {
  const T* p;  // null: nothing
  int64_t ld;
};

// B's panel into the first-level cache, widened once for all tiles of rows (moe-cpu-widened-panels). fp32 gains from it
// only with AVX2; pairs of bf16 lose (moe-cpu-activation-gradients).
template <class T> constexpr bool kPackB = Operand<T>::K_STEP == 1 && (sizeof(T) == 2 || W == 8);
template <class T, class B>
static void pack_panel(B b, int64_t groups, Ahead<T> ahead, typename Operand<T>::Group* out) {
  for (int64_t g = 0; g < groups; g++, out += kPanel) {
    typename Operand<T>::Vec v[2];
    b.get(g, v);
    if (ahead.p) __builtin_prefetch(ahead.p + g * ahead.ld, 0, 2);
    memcpy(out, v, sizeof v);
  }
}

// acc += A . B over `groups`; A's group (row i, g) is a[i * RS + g * gs]
template <class T, int MR, int RS, class B>
static inline void outer_tile(vf acc[MR][2], const typename Operand<T>::Group* a, int64_t gs, B b, int64_t groups,
                              Ahead<T> ahead) {
  typedef Operand<T> Op;
  for (int64_t g = 0; g < groups; g++) {
    typename Op::Vec bv[2];
    b.get(g, bv);
    if (ahead.p)
      for (int i = 0; i < Op::K_STEP; i++) __builtin_prefetch(ahead.p + (g * Op::K_STEP + i) * ahead.ld, 0, 2);
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++) {
      const typename Op::Vec x = Op::broadcast(a + i * RS + g * gs);
      acc[i][0] = Op::mac(acc[i][0], x, bv[0]);
      acc[i][1] = Op::mac(acc[i][1], x, bv[1]);
    }
  }
}

// C[MR, kPanel] = or += acc
template <int MR, bool FIRST> static inline void put_tile(const vf acc[MR][2], float* c, int64_t ldc) {
#pragma GCC unroll 12
  for (int i = 0; i < MR; i++, c += ldc) {
    store(c, FIRST ? acc[i][0] : load(c) + acc[i][0]);
    store(c + W, FIRST ? acc[i][1] : load(c + W) + acc[i][1]);
  }
}

template <class T, int MR, class B>
static void outer_tile_f32(const typename Operand<T>::Group* a, B b, int64_t groups, Ahead<T> ahead, bool first,
                           float* c, int64_t ldc, int64_t n) {
  vf acc[MR][2] = {};  // a k block is summed on its own, then added: the error grows with the blocks, not with k
  outer_tile<T, MR, kGroupStride>(acc, a, 1, b, groups, ahead);
  if (n == kPanel) return first ? put_tile<MR, true>(acc, c, ldc) : put_tile<MR, false>(acc, c, ldc);
  for (int i = 0; i < MR; i++)
    for (int64_t j = 0; j * W < n; j++) {
      float* p = c + i * ldc + j * W;
      store_part(p, first ? acc[i][j] : load_part(p, n - j * W) + acc[i][j], n - j * W);
    }
}

template <class T, class B> struct OuterTiles {
  typedef void (*Fn)(const typename Operand<T>::Group*, B, int64_t, Ahead<T>, bool, float*, int64_t, int64_t);
  static constexpr Fn table[12] = {
      outer_tile_f32<T, 1, B>,  outer_tile_f32<T, 2, B>,  outer_tile_f32<T, 3, B>,
      outer_tile_f32<T, 4, B>,  outer_tile_f32<T, 5, B>,  outer_tile_f32<T, 6, B>,
#if defined(__AVX512F__)
      outer_tile_f32<T, 7, B>,  outer_tile_f32<T, 8, B>,  outer_tile_f32<T, 9, B>,
      outer_tile_f32<T, 10, B>, outer_tile_f32<T, 11, B>, outer_tile_f32<T, 12, B>,
#endif
  };
};

// Packs k0 .. k0 + k of M rows: out[m][kGroupStride], the last group padded with zeros.
static inline void pack_row(const float* a, int64_t k, float* out) { memcpy(out, a, k * sizeof(float)); }
template <class T> static inline void pack_row(const T* a, int64_t k, float* out) {
  for (int64_t i = 0; i < k; i += W) store_part(out + i, load_part(a + i, k - i), k - i);
}
static inline void pack_row(const bf16* a, int64_t k, uint32_t* out) {
  if (k & 1) out[k / 2] = 0;
  memcpy(out, a, k * sizeof(bf16));
}

// One panel of C against one k block, tile by tile; the first to read B prefetches.
template <class T, class B>
static void outer_panel(const typename Operand<T>::Group* a, int64_t M, B b, int64_t groups, Ahead<T> ahead, bool first,
                        float* c, int64_t ldc, int64_t n) {
  const int64_t tiles = (M + kOuterTile - 1) / kOuterTile;
  if constexpr (kPackB<T>)
    if (!B::packed && tiles > 1) {
      alignas(64) typename Operand<T>::Group panel[kGroups * kPanel];
      pack_panel<T>(b, groups, ahead, panel);
      return outer_panel<T>(a, M, PackedB<T>{panel}, groups, Ahead<T>{nullptr, 0}, first, c, ldc, n);
    }
  for (int64_t t = 0; t < tiles; t++, ahead.p = nullptr) {  // rows spread evenly: no tile is left with one row
    const int64_t m0 = M * t / tiles, m1 = M * (t + 1) / tiles;
    OuterTiles<T, B>::table[m1 - m0 - 1](a + m0 * kGroupStride, b, groups, ahead, first, c + m0 * ldc, ldc, n);
  }
}

template <class T> void outer_gemm_kernel(const GemmBlock& g) {
  typedef Operand<T> Op;
  typedef typename Op::Group Group;
  const T* const* a = reinterpret_cast<const T* const*>(g.a_rows);
  const T* b = static_cast<const T*>(g.b);
  Group* a_pack = static_cast<Group*>(g.scratch);
  for (int64_t k0 = 0; k0 < g.K; k0 += kGroups * Op::K_STEP) {
    const bool first = k0 == 0 && !g.accumulate;
    const int64_t k = g.K - k0 < kGroups * Op::K_STEP ? g.K - k0 : kGroups * Op::K_STEP;
    const int64_t groups = (k + Op::K_STEP - 1) / Op::K_STEP;
    for (int64_t m = 0; m < g.M; m++) pack_row(a[m] + k0, k, a_pack + m * kGroupStride);
    for (int64_t n0 = 0; n0 < g.N; n0 += kPanel) {
      const int64_t n = g.N - n0 < kPanel ? g.N - n0 : kPanel;
      const T* panel = b + k0 * g.ldb + n0;
      // the next panel, or the first of the next k block
      const T* next = n0 + kPanel < g.N ? panel + kPanel : k0 + k < g.K ? b + (k0 + k) * g.ldb : nullptr;
      const Ahead<T> ahead = {next, g.ldb};
      if (n == kPanel && k % Op::K_STEP == 0)
        outer_panel<T>(a_pack, g.M, RowsB<T, true>{panel, g.ldb, k, n}, groups, ahead, first, g.c + n0, g.ldc, n);
      else
        outer_panel<T>(a_pack, g.M, RowsB<T, false>{panel, g.ldb, k, n}, groups, ahead, first, g.c + n0, g.ldc, n);
    }
  }
}
}  // namespace sail::cpu::SAIL_ISA
