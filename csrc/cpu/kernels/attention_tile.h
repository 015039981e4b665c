// What attention's forward and backward share: packed operands, and products of tiles that lie in the first-level cache.
// A group is K_STEP elements along the sum (operand.h). Operands:
//   row form      [chunk of kGroups][row][kGroupStride]  broadcast side of sums along D, or along keys
//   column form   [group of rows][kColumnStride]         broadcast side of sums along rows
//   panels        [panel][group][kPanel]                 vector side; "transposed": sums along D, "rows": along rows
#pragma once
#include "attention.h"
#include "gemm.h"
#include "gemm_wgrad.h"

namespace sail::cpu::SAIL_ISA {
template <class T> using Group = typename Operand<T>::Group;
template <class T> constexpr int64_t kBlock = kGroups * Operand<T>::K_STEP;  // rows and keys of a block
template <class T> constexpr int64_t kColumnStride = kBlock<T> + 16;         // no power of two: see kGroupStride
template <class T> static inline int64_t groups_of(int64_t n) {
  return (n + Operand<T>::K_STEP - 1) / Operand<T>::K_STEP;
}

// ---- products
// C[MR, kPanel] = or += A . B; A's group (row i, g) is a[i * RS + g * gs], B is a panel
template <class T, int RS, int MR>
static void product_tile(const Group<T>* a, int64_t gs, const Group<T>* b, int64_t groups, bool first, float* c,
                         int64_t ldc) {
  vf acc[MR][2] = {};
  outer_tile<T, MR, RS>(acc, a, gs, PackedB<T>{b}, groups, Ahead<T>{nullptr, 0});
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < 2; j++) {
      float* p = c + i * ldc + j * W;
      store(p, first ? acc[i][j] : load(p) + acc[i][j]);
    }
}

template <class T, int RS> struct Product {
  typedef void (*Fn)(const Group<T>*, int64_t, const Group<T>*, int64_t, bool, float*, int64_t);
  static constexpr Fn by_rows[12] = {
      product_tile<T, RS, 1>,  product_tile<T, RS, 2>,  product_tile<T, RS, 3>,
      product_tile<T, RS, 4>,  product_tile<T, RS, 5>,  product_tile<T, RS, 6>,
#if defined(__AVX512F__)
      product_tile<T, RS, 7>,  product_tile<T, RS, 8>,  product_tile<T, RS, 9>,
      product_tile<T, RS, 10>, product_tile<T, RS, 11>, product_tile<T, RS, 12>,
#endif
  };
};

// C[rows, columns] = A . B^T along D, rows of C kBlock apart; A in row form, B transposed. Whole panels are computed.
template <class T>
static void product_along_d(const Group<T>* a, int64_t rows, const Group<T>* b, int64_t groups, int64_t columns,
                            float* c) {
  for (int64_t n = 0; n < columns; n += kPanel, b += groups * kPanel)
    for (int64_t g = 0; g < groups; g += kGroups)  // chunks are summed on their own
      Product<T, kGroupStride>::by_rows[rows - 1](a + g / kGroups * kBlock<T> * kGroupStride, 1, b + g * kPanel,
                                                  groups - g < kGroups ? groups - g : kGroups, g == 0, c + n,
                                                  kBlock<T>);
}

// C[rows, D] = or += A . B along B's groups of rows g0 .. g0 + groups, rows of C attention_width(D) apart. Whole panels
// are computed.
template <class T, int RS>
static void product_along_rows(const Group<T>* a, int64_t gs, int64_t rows, const Group<T>* b, int64_t g0,
                               int64_t groups, bool first, int64_t D, float* c) {
  for (int64_t n = 0; n < D; n += kPanel, b += kGroups * kPanel)
    Product<T, RS>::by_rows[rows - 1](a, gs, b + g0 * kPanel, groups, first, c + n, attention_width(D));
}

// ---- packing
// M rows of D in row form
template <class T> static void pack_row_form(const void* const* rows, int64_t M, int64_t D, Group<T>* out) {
  constexpr int64_t step = kGroups * Operand<T>::K_STEP;
  for (int64_t d = 0; d < D; d += step, out += kBlock<T> * kGroupStride)
    for (int64_t m = 0; m < M; m++)
      pack_row(static_cast<const T*>(rows[m]) + d, D - d < step ? D - d : step, out + m * kGroupStride);
}

// The scale of the scores: in fp32 operands it is taken into q, so that a row's largest score is its maximum to the bit;
// scaling bf16 operands would round them once more, and their scores are scaled instead.
template <class T> constexpr bool kScaledQ = Operand<T>::K_STEP == 1;
template <class T> static void pack_scaled_q(const void* const* rows, int64_t M, int64_t D, float scale,
                                             Group<T>* out) {
  pack_row_form<T>(rows, M, D, out);
  if constexpr (kScaledQ<T>)
    for (int64_t d = 0; d < D; d += kGroups, out += kBlock<T> * kGroupStride)
      for (int64_t m = 0; m < M; m++)
        for (int64_t g = 0; g < kGroups && d + g < D; g++) out[m * kGroupStride + g] *= scale;
}
template <class T> static inline vf score(const float* s, [[maybe_unused]] vf scale) {
  if constexpr (kScaledQ<T>)
    return load(s);
  else
    return load(s) * scale;
}

// M rows of D in panels, for sums along the rows
template <class T> static void pack_panels(const T* const* rows, int64_t M, int64_t D, Group<T>* out) {
  for (int64_t d = 0; d < D; d += kPanel, out += kGroups * kPanel)
    pack_columns(rows, M, d, D - d < kPanel ? D - d : kPanel, kPanel, out);
}

// W x W groups in registers: after it v[j] lane i is what v[i] lane j was
static inline void transpose(vu v[W]) {
#pragma GCC unroll 4
  for (int s = 1; s < W; s *= 2) {
    vu low, high;  // of lanes without bit s: own, and the other's; of lanes with it: the other's, and own
    for (int l = 0; l < W; l++) {
      low[l] = l & s ? W + l - s : l;
      high[l] = l & s ? W + l : l + s;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
      if (i & s) continue;
      const vu a = v[i], b = v[i + s];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + s] = __builtin_shuffle(a, b, high);
    }
  }
}

template <class T> void pack_transposed_kernel(const AttentionPack& p) {
  typedef Operand<T> Op;
  const int64_t groups = groups_of<T>(p.D);
  Group<T>* out = static_cast<Group<T>*>(p.out);
  for (int64_t n = 0; n < p.n || n % kPanel; n += W) {
    Group<T>* panel = out + n / kPanel * groups * kPanel + n % kPanel;
    for (int64_t g = 0; g < groups; g += W) {
      const int64_t d = g * Op::K_STEP, left = p.D - d;
      vu v[W] = {};
      for (int i = 0; i < W; i++) {
        if (n + i >= p.n) break;
        const T* row = reinterpret_cast<const T*>(p.rows + (n + i) * p.row_bytes) + d;
        const typename Op::Vec x = left < Op::LOAD ? Op::load_k(row, static_cast<int>(left)) : Op::load_k(row);
        memcpy(&v[i], &x, sizeof x);
      }
      transpose(v);
      for (int i = 0; i < W && g + i < groups; i++) memcpy(panel + (g + i) * kPanel, &v[i], sizeof v[i]);
    }
  }
}

template <class T> void pack_rows_kernel(const AttentionPack& p) {
  const T* rows[kBlock<T>];
  for (int64_t n = 0; n < p.n; n++) rows[n] = reinterpret_cast<const T*>(p.rows + n * p.row_bytes);
  pack_panels<T>(rows, p.n, p.D, static_cast<Group<T>*>(p.out));
}

// ---- vectors
static inline vf keep_first(vf v, int64_t n, float other) {  // lanes n and up become `other`
  vi lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  return lane < static_cast<int32_t>(n) ? v : set1(other);
}
static inline float max_lane(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float m = v[0];
  for (int i = 1; i < W; i++) m = v[i] > m ? v[i] : m;
  return m;
#endif
}
static inline float vexp1(float x) { return vexp(set1(x))[0]; }

// Row r, columns c .. c + W, as the broadcast side of a sum along the columns.
static inline void put_row_form(float* out, int64_t r, int64_t c, vf v) { store(out + r * kGroupStride + c, v); }
// Rows r and r + 1 (r even), as the broadcast side of a sum along the rows.
template <class T> static inline void put_column_form(float* out, int64_t r, int64_t c, vf v0, vf v1) {
  store(out + r * kColumnStride<T> + c, v0);
  store(out + (r + 1) * kColumnStride<T> + c, v1);
}
#if defined(__AVX512BF16__)
static inline void put_row_form(uint32_t* out, int64_t r, int64_t c, vf v) {
  store(reinterpret_cast<bf16*>(out + r * kGroupStride) + c, v);
}
template <class T> static inline void put_column_form(uint32_t* out, int64_t r, int64_t c, vf v0, vf v1) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(v1, v0);
  const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(out + r / 2 * kColumnStride<T> + c, _mm512_permutexvar_epi16(pairs, halves));
}
#endif

// Hands out a kernel's scratch, in pieces aligned to 64 bytes.
struct Scratch {
  char* p;
  template <class U> U* take(int64_t n) {
    U* out = reinterpret_cast<U*>(p);
    p += (n * static_cast<int64_t>(sizeof(U)) + 63) / 64 * 64;
    return out;
  }
};
}  // namespace sail::cpu::SAIL_ISA
