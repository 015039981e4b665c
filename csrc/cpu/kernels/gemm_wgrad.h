// O[M, N] (+)= A[R, M]^T . B[R, N]: the gradient of a weight. R is the number of an expert's rows, often below 64, while O is
// the whole weight: each output is touched once, streamed past the caches where it is overwritten.
#pragma once
#include "gemm_outer.h"

namespace sail::cpu::SAIL_ISA {
constexpr int kWgradAhead = 4;  // panels between prefetch and use of an accumulated gradient's old values

// Past the caches; p is aligned to a vector.
static inline void stream_vector([[maybe_unused]] vf* p, [[maybe_unused]] vf v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(p), v);
#elif defined(__AVX2__)
  _mm256_stream_ps(reinterpret_cast<float*>(p), v);
#endif
}

// One row of a tile: n of kPanel columns.
template <class TO> static inline void put_row(TO* o, const vf acc[2], int64_t n, Output mode, bool stream) {
  vf lo = acc[0], hi = acc[1];
  if (mode == Output::accumulate) {
    lo += load_part(o, n);
    if (n > W) hi += load_part(o + W, n - W);
  }
#if defined(__AVX2__)
  if (sizeof(TO) * kPanel >= 64 && stream && n == kPanel) {  // half a line past the caches is slower than none
    alignas(64) TO line[kPanel];
    store(line, lo);
    store(line + W, hi);
    for (unsigned i = 0; i < sizeof line / sizeof(vf); i++)
      stream_vector(reinterpret_cast<vf*>(o) + i, reinterpret_cast<const vf*>(line)[i]);
    return;
  }
#endif
  (void)stream;
  store_part(o, lo, n);
  if (n > W) store_part(o + W, hi, n - W);
}

#if defined(__AVX512BF16__)
static inline void put_row(bf16* o, const vf acc[2], int64_t n, Output mode, bool stream) {
  if (n != kPanel) return put_row<bf16>(o, acc, n, mode, false);
  vf lo = acc[0], hi = acc[1];
  if (mode == Output::accumulate) lo += load(o), hi += load(o + W);
  const __m512i line = (__m512i)_mm512_cvtne2ps_pbh(hi, lo);
  if (stream)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(o), line);
  else
    _mm512_storeu_si512(o, line);
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
static inline __m256i rounded_bits(vf v) {  // of bf16, in the lower halves; v is no NaN
  const vu u = reinterpret_cast<vu>(v);
  return (__m256i)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline void put_row(bf16* o, const vf acc[2], int64_t n, Output mode, bool) {
  if (n != kPanel) return put_row<bf16>(o, acc, n, mode, false);
  vf lo = acc[0], hi = acc[1];
  if (mode == Output::accumulate) lo += load(o), hi += load(o + W);
  if (_mm256_movemask_ps(_mm256_cmp_ps(lo, hi, _CMP_UNORD_Q))) {
    store(o, lo);
    store(o + W, hi);
    return;
  }
  const __m256i pairs = _mm256_packus_epi32(rounded_bits(lo), rounded_bits(hi));  // of 128 bits each
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(o), _mm256_permute4x64_epi64(pairs, _MM_SHUFFLE(3, 1, 2, 0)));
}
#endif

// Columns m0 .. m0 + M in groups along R: out[g][stride], those past M as zeros.
template <class T>
static void pack_columns(const T* const* rows, int64_t R, int64_t m0, int64_t M, int64_t stride,
                         typename Operand<T>::Group* out) {
  typedef Operand<T> Op;
  for (int64_t r = 0; r < R; r += Op::K_STEP, out += stride) {
    const T *row0 = rows[r] + m0, *row1 = r + 1 < R ? rows[r + 1] + m0 : nullptr;
    for (int64_t m = 0; m < stride; m += kPanel) {
      typename Op::Vec v[2] = {};
      if (m < M) Op::interleave(row0 + m, row1 ? row1 + m : nullptr, M - m < kPanel ? M - m : kPanel, v);
      memcpy(out + m, v, sizeof v);
    }
  }
}

template <class T, class TO> void wgrad_gemm_kernel(const WgradBlock& w) {
  typedef Operand<T> Op;
  typedef typename Op::Group Group;
  const T* const* a = reinterpret_cast<const T* const*>(w.a_rows);
  const T* const* b = reinterpret_cast<const T* const*>(w.b_rows);
  TO* out = static_cast<TO*>(w.out);
  const int64_t groups = (w.R + Op::K_STEP - 1) / Op::K_STEP;
  // whole panels, and at least one tile of slack for the last, partly empty one
  const int64_t stride = (w.M + kOuterTile + kPanel - 1) / kPanel * kPanel;
  Group* a_pack = static_cast<Group*>(w.scratch);
  Group* b_pack = a_pack + groups * stride;
  pack_columns(a, w.R, w.m0, w.M, stride, a_pack);

  const int64_t panel_groups = groups * kPanel;
  const int64_t room = (w.scratch_bytes / 4 - groups * stride) / panel_groups;
  const bool stream =
      w.mode == Output::overwrite && reinterpret_cast<uintptr_t>(out) % 64 == 0 && w.ldo * sizeof(TO) % 64 == 0;
  for (int64_t n0 = 0; n0 < w.N; n0 += room * kPanel) {
    const int64_t n1 = w.N - n0 < room * kPanel ? w.N : n0 + room * kPanel;
    for (int64_t n = n0; n < n1; n += kPanel)
      pack_columns(b, w.R, n, n1 - n, kPanel, b_pack + (n - n0) / kPanel * panel_groups);
    for (int64_t m = 0; m < w.M; m += kOuterTile) {
      const int64_t rows = w.M - m < kOuterTile ? w.M - m : kOuterTile;
      for (int64_t n = n0; n < n1; n += kPanel) {
        if (w.mode == Output::accumulate)  // old values come from memory
          for (int64_t i = 0; i < rows; i++)
            for (unsigned j = 0; j < sizeof(TO) * kPanel; j += 64)
              __builtin_prefetch(reinterpret_cast<const char*>(out + (m + i) * w.ldo + n + kWgradAhead * kPanel) + j, 1,
                                 2);
        const Group* panel = b_pack + (n - n0) / kPanel * panel_groups;
        const auto sum = [&](int64_t g, vf part[kOuterTile][2]) {
          outer_tile<T, kOuterTile, 1>(part, a_pack + g * stride + m, stride, PackedB<T>{panel + g * kPanel},
                                       groups - g < kGroups ? groups - g : kGroups, Ahead<T>{nullptr, 0});
        };
        vf acc[kOuterTile][2] = {};
        sum(0, acc);
        for (int64_t g = kGroups; g < groups; g += kGroups) {  // blocks of rows are summed on their own, then added
          vf part[kOuterTile][2] = {};
          sum(g, part);
#pragma GCC unroll 12
          for (int i = 0; i < kOuterTile; i++) acc[i][0] += part[i][0], acc[i][1] += part[i][1];
        }
        const int64_t cols = w.N - n < kPanel ? w.N - n : kPanel;
#pragma GCC unroll 12
        for (int i = 0; i < kOuterTile; i++)
          if (i < rows) put_row(out + (m + i) * w.ldo + n, acc[i], cols, w.mode, stream);
      }
    }
  }
#if defined(__AVX2__)
  _mm_sfence();  // streamed lines are visible before the thread says it is done
#endif
}
}  // namespace sail::cpu::SAIL_ISA
