// out = softmax(scale * q . k^T) . v of a block of rows, keys a block at a time (online softmax).
// A tile of kOuterTile rows goes through all three steps while its scores lie in the first-level cache.
#pragma once
#include "attention_tile.h"

namespace sail::cpu::SAIL_ISA {
template <class T> struct ForwardState {
  Group<T>* q;  // row form
  float* o;     // [M, width], unnormalized
  float* s;     // [kOuterTile, kBlock] scores
  Group<T>* p;  // [kOuterTile, kGroupStride] probabilities, unnormalized, row form
  float* max;   // [M]
  vf* total;    // [M], lanes not yet added

  explicit ForwardState(Scratch s0, int64_t chunks, int64_t width)
      : q(s0.take<Group<T>>(chunks * kBlock<T> * kGroupStride)),
        o(s0.take<float>(kBlock<T> * width)),
        s(s0.take<float>(kOuterTile * kBlock<T>)),
        p(s0.take<Group<T>>(kOuterTile * kGroupStride)),
        max(s0.take<float>(kBlock<T>)),
        total(s0.take<vf>(kBlock<T>)) {}
};

// One row's scores become probabilities under its new maximum, to which o and total are scaled down.
template <class T>
static void softmax_row(const ForwardState<T>& f, int64_t m, int64_t i, int64_t visible, int64_t columns, float scale,
                        bool first, int64_t D) {
  const float* s = f.s + i * kBlock<T>;
  vf most = set1(-INFINITY);
  for (int64_t c = 0; c < visible; c += W) {
    const vf x = score<T>(s + c, set1(scale));
    most = vmax(most, c + W > visible ? keep_first(x, visible - c, -INFINITY) : x);
  }
  const float before = first ? -INFINITY : f.max[m], block = max_lane(most), now = block > before ? block : before;
  vf total = first ? vf{} : f.total[m];
  if (!first && now > before) {
    const float shrink = vexp1(before - now);
    total *= shrink;
    float* o = f.o + m * attention_width(D);
    for (int64_t d = 0; d < D; d += W) store(o + d, load(o + d) * shrink);
  }
  for (int64_t c = 0; c < columns; c += W) {
    vf e = vexp(score<T>(s + c, set1(scale)) - now);
    if (c + W > visible) e = keep_first(e, visible - c, 0);
    total += e;
    put_row_form(f.p, i, c, e);
  }
  f.max[m] = now;
  f.total[m] = total;
}

template <class T> static void finish_row(const ForwardState<T>& f, int64_t m, int64_t D, void* out, float* lse) {
  const float total = sum(f.total[m]), inverse = 1.f / total;
  const float* o = f.o + m * attention_width(D);
  for (int64_t d = 0; d < D; d += W) store_part(static_cast<T*>(out) + d, load(o + d) * inverse, D - d);
  *lse = f.max[m] + logf(total);
}

template <class T> static void zero_row(int64_t D, void* out, float* lse) {
  memset(out, 0, D * sizeof(T));
  *lse = -INFINITY;
}

template <class T> void attention_forward_kernel(const AttentionForward& f) {
  const int64_t groups = groups_of<T>(f.D), chunks = (groups + kGroups - 1) / kGroups, width = attention_width(f.D);
  const ForwardState<T> state(Scratch{static_cast<char*>(f.scratch)}, chunks, width);
  pack_scaled_q<T>(f.q, f.M, f.D, f.scale, state.q);
  int64_t from = 0;  // first row that sees the block
  for (int64_t k0 = 0, b = 0; k0 < f.limit[f.M - 1]; k0 += kBlock<T>, b++) {
    const Group<T>* k = reinterpret_cast<const Group<T>*>(f.k_transposed + b * attention_pack_bytes(f.D));
    const Group<T>* v = reinterpret_cast<const Group<T>*>(f.v_rows + b * attention_pack_bytes(f.D));
    while (f.limit[from] <= k0) from++;
    const int64_t tiles = (f.M - from + kOuterTile - 1) / kOuterTile;
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t m0 = from + (f.M - from) * t / tiles, m1 = from + (f.M - from) * (t + 1) / tiles;
      const int64_t seen = f.limit[m1 - 1] - k0 < kBlock<T> ? f.limit[m1 - 1] - k0 : kBlock<T>;
      product_along_d<T>(state.q + m0 * kGroupStride, m1 - m0, k, groups, seen, state.s);
      for (int64_t m = m0; m < m1; m++) {
        const int64_t visible = f.limit[m] - k0 < seen ? f.limit[m] - k0 : seen;
        softmax_row<T>(state, m, m - m0, visible, seen, f.scale, b == 0, f.D);
      }
      product_along_rows<T, kGroupStride>(state.p, 1, m1 - m0, v, 0, groups_of<T>(seen), b == 0, f.D,
                                          state.o + m0 * width);
    }
  }
  for (int64_t m = 0; m < f.M; m++) {
    if (f.limit[m] <= 0)
      zero_row<T>(f.D, f.out[m], f.lse[m]);
    else
      finish_row<T>(state, m, f.D, f.out[m], f.lse[m]);
  }
}
}  // namespace sail::cpu::SAIL_ISA
