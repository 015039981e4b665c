// Gradients of attention from a block of rows, with P recomputed from lse; s, dp [rows, keys]:
//   p = exp(scale * q . k^T - lse)   dp = dout . v^T   ds = p * (dp - delta + dlse)
//   delta = <dout, out>
//   dq = scale * ds . k              dv += p^T . dout  dk += ds^T . q
// Five products, each computed once: dq is whole after all blocks of keys, dk and dv belong to the caller, who adds the
// blocks of rows in a fixed order.
#pragma once
#include "attention_tile.h"

namespace sail::cpu::SAIL_ISA {
// find_factors needs all scores of a block of rows before the first gradient. For so many keys they are kept, 1 MB of the
// scratch, instead of computed again: one product of six.
constexpr int64_t kKeptKeys = 4096;

template <class T> struct BackwardState {
  Group<T>*q, *dout;  // row form
  Group<T>*q_panels, *dout_panels;
  float* dq;                        // [M, width]
  float* factor;                    // [M], of p
  float *s, *dp;                    // [kOuterTile, kBlock]
  Group<T>* ds;                     // [kOuterTile, kGroupStride], row form
  Group<T>*p_columns, *ds_columns;  // of the whole block, column form
  float* scores;                    // [block of keys, kBlock rows, kBlock], of find_factors; null: not kept

  BackwardState(Scratch s0, int64_t chunks, int64_t width, bool keep)
      : q(s0.take<Group<T>>(chunks * kBlock<T> * kGroupStride)),
        dout(s0.take<Group<T>>(chunks * kBlock<T> * kGroupStride)),
        q_panels(s0.take<Group<T>>(kGroups * width)),
        dout_panels(s0.take<Group<T>>(kGroups * width)),
        dq(s0.take<float>(kBlock<T> * width)),
        factor(s0.take<float>(kBlock<T>)),
        s(s0.take<float>(kOuterTile * kBlock<T>)),
        dp(s0.take<float>(kOuterTile * kBlock<T>)),
        ds(s0.take<Group<T>>(kOuterTile * kGroupStride)),
        p_columns(s0.take<Group<T>>(kGroups * kColumnStride<T>)),
        ds_columns(s0.take<Group<T>>(kGroups * kColumnStride<T>)),
        scores(keep ? s0.take<float>(kKeptKeys * kBlock<T>) : nullptr) {}

  // of the tile from row m on, against one block of keys
  float* scores_of(int64_t index, int64_t m) const { return scores ? scores + (index * kBlock<T> + m) * kBlock<T> : s; }
};

// One row of a tile: its scores become p / factor, zero where a key is not seen.
// Where the row sees no key but these, the softmax is done again instead of taken from lse, and delta is the sum of p dp:
// the rounding of lse and, in <dout, out>, that of out would show where the keys are few.
struct Factors {
  float p, delta, dlse;  // ds = p * ((dp - delta) + dlse)
};
template <class T>
static Factors probabilities(const AttentionBackward& b, float factor, int64_t m, int64_t k0, int64_t columns, float* s,
                             const float* dp) {
  const int64_t visible = b.limit[m] - k0;
  const bool whole = visible > 0 && b.limit[m] <= kBlock<T>;
  const vf scale = set1(b.scale);
  vf shift = set1(b.lse[m]);
  if (whole) {
    vf most = set1(-INFINITY);
    for (int64_t c = 0; c < visible; c += W)
      most = vmax(most, keep_first(score<T>(s + c, scale), visible - c < W ? visible - c : W, -INFINITY));
    shift = set1(max_lane(most));
  }
  vf total = {}, dot = {};
  for (int64_t c = 0; c < columns; c += W) {
    vf p = vexp(score<T>(s + c, scale) - shift), d = load(dp + c);
    if (c + W > visible) p = keep_first(p, visible - c, 0), d = keep_first(d, visible - c, 0);
    store(s + c, p);
    if (whole) total += p, dot = fma(p, d, dot);
  }
  if (!whole) return {factor, b.dout_out[m], b.dlse[m]};
  return {1 / sum(total), sum(dot) / sum(total), b.dlse[m]};
}

// Rows m and m + 1 (m even; the second may not exist), which lie at i and i + 1 of the tile with the scores s.
template <class T>
static void gradient_pair(const AttentionBackward& b, const BackwardState<T>& state, int64_t m, int64_t i, int64_t k0,
                          int64_t columns, float* s) {
  const bool second = m + 1 < b.M;
  float *p0 = s + i * kBlock<T>, *p1 = p0 + kBlock<T>;
  const float *dp0 = state.dp + i * kBlock<T>, *dp1 = dp0 + kBlock<T>;
  const Factors f0 = probabilities<T>(b, state.factor[m], m, k0, columns, p0, dp0);
  const Factors f1 = second ? probabilities<T>(b, state.factor[m + 1], m + 1, k0, columns, p1, dp1) : Factors{};
  const int64_t n0 = b.limit[m] - k0, n1 = second ? b.limit[m + 1] - k0 : 0;
  for (int64_t c = 0; c < columns; c += W) {
    const vf a = load(p0 + c) * f0.p, z = second ? load(p1 + c) * f1.p : vf{};
    vf da = a * ((load(dp0 + c) - f0.delta) + f0.dlse), dz = z * ((load(dp1 + c) - f1.delta) + f1.dlse);
    if (c + W > n0) da = keep_first(da, n0 - c, 0);
    if (c + W > n1) dz = keep_first(dz, n1 - c, 0);
    put_row_form(state.ds, i, c, da);
    if (second) put_row_form(state.ds, i + 1, c, dz);
    put_column_form<T>(state.p_columns, m, c, a, z);
    put_column_form<T>(state.ds_columns, m, c, da, dz);
  }
}

// In fp32 the rounding of lse would be the largest error of p: a pass of its own over the keys finds what p sums to.
template <class T> static void find_factors(const AttentionBackward& b, const BackwardState<T>& state) {
  for (int64_t m = 0; m < b.M; m++) state.factor[m] = 1;
  if constexpr (sizeof(T) != 4) return;
  const int64_t groups = groups_of<T>(b.D);
  for (int64_t m0 = 0; m0 < b.M; m0 += kOuterTile) {
    const int64_t m1 = m0 + kOuterTile < b.M ? m0 + kOuterTile : b.M;
    vf total[kOuterTile] = {};
    for (int64_t k0 = 0, index = 0; k0 < b.limit[m1 - 1]; k0 += kBlock<T>, index++) {
      const int64_t left = b.limit[m1 - 1] - k0, seen = left < kBlock<T> ? left : kBlock<T>;
      float* s = state.scores_of(index, m0);
      product_along_d<T>(state.q + m0 * kGroupStride, m1 - m0,
                         reinterpret_cast<const Group<T>*>(b.k_transposed + index * attention_pack_bytes(b.D)), groups,
                         seen, s);
      for (int64_t m = m0; m < m1; m++)
        for (int64_t c = 0; c < seen && k0 + c < b.limit[m]; c += W)
          total[m - m0] += keep_first(vexp(load(s + (m - m0) * kBlock<T> + c) - b.lse[m]), b.limit[m] - k0 - c, 0);
    }
    for (int64_t m = m0; m < m1; m++)
      if (b.limit[m] > 0) state.factor[m] = 1 / sum(total[m - m0]);
  }
}

// Rows `from` (even) .. M against one block of keys: all but dk and dv
template <class T>
static void gradient_rows(const AttentionBackward& b, const BackwardState<T>& state, int64_t from, int64_t k0,
                          int64_t keys, int64_t index) {
  const int64_t groups = groups_of<T>(b.D), width = attention_width(b.D), offset = index * attention_pack_bytes(b.D);
  const Group<T>* k = reinterpret_cast<const Group<T>*>(b.k_transposed + offset);
  const Group<T>* v = reinterpret_cast<const Group<T>*>(b.v_transposed + offset);
  const Group<T>* k_rows = reinterpret_cast<const Group<T>*>(b.k_rows + offset);
  const int64_t pairs = (b.M - from + 1) / 2, tiles = (2 * pairs + kOuterTile - 1) / kOuterTile;
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t m0 = from + 2 * (pairs * t / tiles), end = from + 2 * (pairs * (t + 1) / tiles);
    const int64_t m1 = end < b.M ? end : b.M, limit = b.limit[m1 - 1] - k0, seen = limit < keys ? limit : keys;
    float* s = state.scores_of(index, m0);
    if (!state.scores) product_along_d<T>(state.q + m0 * kGroupStride, m1 - m0, k, groups, seen, s);
    product_along_d<T>(state.dout + m0 * kGroupStride, m1 - m0, v, groups, seen, state.dp);
    // zeros up to the last key: a tile of keys starts at the first row that sees one of them
    for (int64_t m = m0; m < m1; m += 2) gradient_pair<T>(b, state, m, m - m0, k0, keys, s);
    product_along_rows<T, kGroupStride>(state.ds, 1, m1 - m0, k_rows, 0, groups_of<T>(seen), false, b.D,
                                        state.dq + m0 * width);
  }
}

// dk and dv of one block of keys
template <class T>
static void gradient_keys(const AttentionBackward& b, const BackwardState<T>& state, int64_t from, int64_t k0,
                          int64_t keys) {
  const int64_t width = attention_width(b.D), tiles = (keys + kOuterTile - 1) / kOuterTile;
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t n0 = keys * t / tiles, n1 = keys * (t + 1) / tiles;
    while (b.limit[from] <= k0 + n0) from++;
    const int64_t g0 = from / Operand<T>::K_STEP, groups = groups_of<T>(b.M) - g0, at = (k0 + n0) * width;
    const int64_t a = g0 * kColumnStride<T> + n0;
    product_along_rows<T, 1>(state.p_columns + a, kColumnStride<T>, n1 - n0, state.dout_panels, g0, groups, false, b.D,
                             b.dv + at);
    product_along_rows<T, 1>(state.ds_columns + a, kColumnStride<T>, n1 - n0, state.q_panels, g0, groups, false, b.D,
                             b.dk + at);
  }
}

template <class T> void attention_backward_kernel(const AttentionBackward& b) {
  const int64_t groups = groups_of<T>(b.D), chunks = (groups + kGroups - 1) / kGroups, width = attention_width(b.D);
  const int64_t end = b.limit[b.M - 1];
  const bool keep = sizeof(T) == 4 && end <= kKeptKeys;
  const BackwardState<T> state(Scratch{static_cast<char*>(b.scratch)}, chunks, width, keep);
  pack_scaled_q<T>(b.q, b.M, b.D, b.scale, state.q);
  pack_row_form<T>(b.dout, b.M, b.D, state.dout);
  pack_panels<T>(reinterpret_cast<const T* const*>(b.q), b.M, b.D, state.q_panels);
  pack_panels<T>(reinterpret_cast<const T* const*>(b.dout), b.M, b.D, state.dout_panels);
  find_factors(b, state);
  memset(state.dq, 0, b.M * width * sizeof(float));
  int64_t from = 0;  // first row that sees the block
  for (int64_t k0 = 0, index = 0; k0 < end; k0 += kBlock<T>, index++) {
    const int64_t keys = end - k0 < kBlock<T> ? end - k0 : kBlock<T>;
    while (b.limit[from] <= k0) from++;
    gradient_rows<T>(b, state, from / 2 * 2, k0, keys, index);
    gradient_keys<T>(b, state, from, k0, keys);
  }
  for (int64_t m = 0; m < b.M; m++)
    for (int64_t d = 0; d < b.D; d += W)
      store_part(static_cast<T*>(b.dq[m]) + d, load(state.dq + m * width + d) * b.scale, b.D - d);
}
}  // namespace sail::cpu::SAIL_ISA
