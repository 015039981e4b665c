// Attention forward with cp.async, ldmatrix and mma.sync: every card from sm_80 on.
//
// A block has kM rows of one head, a warp kM / kWarps of them, whose running maxima, sums and outputs stay in its
// registers. Keys and values come in tiles of kN rows through a ring of kSlots: K0 V0 K1 V1 ... In phase t the block
// waits for its own copies of tile t, meets (so that all copies are there, and nobody reads tile t - 1 any more), starts
// the copies of tile t + kSlots - 1 into that slot, and multiplies. Copies past the last tile are empty groups, so that
// the number to wait for never changes.
//
// kSplit, for few queries: the heads of a group are rows of one block, so that keys are read once for all of them, and
// a block takes `chunk` keys. Its result goes to memory in fp32; attention_combine_kernel adds those in order.
#pragma once
#include "attention_config.h"
#include "attention_tile_sm80.cuh"

namespace sail::cuda::sm80 {
// Row m of a block's sequence: a query, or with kSplit a query and one of the heads that share a key/value head.
template <bool kSplit> struct QueryRows {
  int group, head0;
  __device__ __forceinline__ int count(int nq) const { return kSplit ? nq * group : nq; }
  __device__ __forceinline__ int query(int m) const { return kSplit ? m / group : m; }
  __device__ __forceinline__ int head(int m) const { return kSplit ? head0 + m % group : head0; }
};

// Rows first .. first + count of a sequence against keys n0 .. n1; query i sees the keys up to i + behind.
struct ForwardWork {
  Sequence s;
  int g, head, first, split, n0, n1, count, behind;
};

template <class Shape>
__device__ __forceinline__ bool find_work(const AttentionForward& a, ForwardWork* w) {
  RowBlock block;
  if (!find_block<Shape::kM, true>(a, a.cu_q, a.S, a.H, &block)) return false;
  const int group = static_cast<int>(a.H / a.G);
  *w = {block.s, block.head / group, block.head, block.first, 0, 0, block.s.nk, 0, 0};
  return true;
}
// splits are neighbors, then key/value heads, then sequences, then blocks of rows
template <class Shape>
__device__ __forceinline__ bool find_work(const AttentionDecode& a, ForwardWork* w) {
  const auto splits = static_cast<uint32_t>(a.splits), G = static_cast<uint32_t>(a.G);
  const uint32_t split = blockIdx.x % splits, rest = blockIdx.x / splits, g = rest % G;
  const auto B = static_cast<uint32_t>(a.B);
  const int group = static_cast<int>(a.H / a.G), first = static_cast<int>(rest / G / B) * Shape::kM;
  Sequence s = sequence(a, rest / G % B);
  const int n0 = static_cast<int>(split * a.chunk), n1 = static_cast<int>(min((split + 1) * a.chunk, int64_t{s.nk}));
  *w = {s, static_cast<int>(g), static_cast<int>(g) * group, first, static_cast<int>(split), n0, n1, 0, 0};
  return first < s.nq * group;
}

template <class T, class Shape, class Arguments>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks) attention_forward_kernel(const Arguments a) {
  constexpr bool kSplit = Shape::kSplit;
  constexpr int kF = Shape::kWarpM / 16;
  using Queries = HeadTile<Shape::kM, Shape::kD>;
  using Keys = HeadTile<Shape::kN, Shape::kD>;
  const int group = static_cast<int>(a.H / a.G), D = static_cast<int>(a.D);
  ForwardWork mine;
  if (!find_work<Shape>(a, &mine)) return;
  const QueryRows<kSplit> rows{group, mine.head};
  mine.count = min(rows.count(mine.s.nq) - mine.first, Shape::kM);
  mine.behind = mine.s.behind(a.causal);
  mine.n1 = min(mine.n1, rows.query(mine.first + mine.count - 1) + mine.behind + 1);
  const ForwardWork& w = share(mine);
  const Sequence& s = w.s;

  const uint32_t queries = ptx::shared_address(dynamic_shared<char>()), ring = queries + Queries::kBytes;
  const T* keys = row_of<T>(a.k, s.batch, s.k0 + w.n0, w.g);
  const T* values = row_of<T>(a.v, s.batch, s.k0 + w.n0, w.g);
  int slot = 0;  // of the tile that is read next
  const auto load = [&](int there, int to, const T** from, int64_t stride) {
    if (there > 0)
      load_tile<T, Keys, Shape::kThreads>(ring + to * Keys::kBytes, there, D,
                                          [&](int row) { return *from + row * stride; });
    ptx::cp_async_commit();
    *from += Shape::kN * stride;
  };
  // Starts the copy of the tile after the next, into the slot of the one before.
  const auto next_tile = [&](int there, const T** from, int64_t stride) {
    ptx::cp_async_wait<Shape::kSlots - 2>();
    __syncthreads();
    const int now = slot;
    load(there, now ? now - 1 : Shape::kSlots - 1, from, stride);
    slot = now + 1 == Shape::kSlots ? 0 : now + 1;
    return ring + now * Keys::kBytes;
  };
  static_assert(Shape::kSlots == 3, "one tile of keys and one of values are under way");
  int left = w.n1 - w.n0;
  if (left > 0)
    load_tile<T, Queries, Shape::kThreads>(queries, w.count, D, [&](int m) {
      return row_of<T>(a.q, s.batch, s.q0 + rows.query(w.first + m), rows.head(w.first + m));
    });
  load(left, 0, &keys, a.k.token);
  load(left, 1, &values, a.v.token);

  const int warp_row = static_cast<int>(threadIdx.x) / 32 * Shape::kWarpM;
  const uint32_t warp_queries = queries + warp_row * Queries::kPitch;
  const float scale = fmaxf(fabsf(a.scale) * kLog2E, 1e-30f);  // positive: a masked score is -inf
  const auto row = [&](int i, int octet) { return warp_row + 16 * i + 8 * octet + lane_row(); };
  Softmax<kF> softmax;
  Fragments<kF, Shape::kD> o;
  clear(o);
  for (; left > 0; left -= Shape::kN) {
    Fragments<kF, Shape::kN> p;
    clear(p);
    const uint32_t key_tile = next_tile(left - Shape::kN, &keys, a.k.token);
    add_scores<T, Queries, Keys>(p, ptx::fresh(warp_queries), key_tile);
    if (a.scale < 0) negate(p);
    const auto last = [&](int m) { return min(w.n1 - 1, rows.query(w.first + m) + w.behind) - (w.n1 - left); };
    if (last(warp_row) < Shape::kN - 1) {
#pragma unroll
      for (int i = 0; i < kF; i++)
#pragma unroll
        for (int octet = 0; octet < 2; octet++) mask(p[i], octet, last(row(i, octet)), -INFINITY);
    }
    softmax.update(p, scale);
    softmax.rescale(o);
    Rounded<kF, Shape::kN> rounded;
    round_rows<T>(rounded, p);
    add_product<T, Keys>(o, rounded, next_tile(left - Shape::kN, &values, a.v.token));
  }
  ptx::cp_async_wait<0>();

  softmax.finish();
  const auto at = [&](int m) { return lse_at(a, s, rows.query(w.first + m), rows.head(w.first + m)); };
#pragma unroll
  for (int i = 0; i < kF; i++)
#pragma unroll
    for (int octet = 0; octet < 2; octet++) {
      const int m = row(i, octet);
      if (m >= w.count || threadIdx.x % 4) continue;
      const float log2_sum = softmax.log2_sum(i, octet, scale);
      if constexpr (kSplit) a.partial_lse[w.split * a.rows() + at(m)] = log2_sum;
      if constexpr (!kSplit) a.lse[at(m)] = log2_sum * kLn2;
    }
  const auto factor = [&](int i, int octet) { return softmax.inverse(i, octet); };
  if constexpr (kSplit) {
    if (w.n1 <= w.n0) return;  // attention_combine_kernel reads no row whose lse is -inf
    const auto to = [&](int i, int octet) {
      const int m = row(i, octet);
      return m < w.count ? a.partial_out + (w.split * a.rows() + at(m)) * D : nullptr;
    };
    store_rows(o, D, to, factor);
  } else {
    const auto to = [&](int i, int octet) {
      const int m = row(i, octet);
      T* out = static_cast<T*>(a.out) + flat_row(a.S, a.H, D, s.batch, s.q0 + w.first + m, w.head);
      return m < w.count ? out : nullptr;
    };
    store_rows(o, D, to, factor);
  }
}

// out = sum of 2^(lse_i - lse) out_i over the splits i, in order: a warp a row, four elements a lane
constexpr int kCombineThreads = 128;
template <class T> __global__ void __launch_bounds__(kCombineThreads)
    attention_combine_kernel(const AttentionDecode a) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t r = blockIdx.x * int64_t{kCombineThreads / 32} + threadIdx.x / 32, R = a.rows();
  if (r >= R) return;
  float most = -INFINITY;
  for (int64_t i = 0; i < a.splits; i++) most = fmaxf(most, a.partial_lse[i * R + r]);
  float sum = 0.f, v[4] = {};
  for (int64_t i = 0; i < a.splits; i++) {
    const float lse = a.partial_lse[i * R + r];
    if (lse == -INFINITY) continue;
    const float weight = ptx::exp2(lse - most);
    sum += weight;
    if (lane * 4 >= a.D) continue;
    float part[4];
    sail::cuda::load(a.partial_out + (i * R + r) * a.D + lane * 4, part);
#pragma unroll
    for (int e = 0; e < 4; e++) v[e] = fmaf(weight, part[e], v[e]);
  }
  const float inverse = sum == 0.f ? 0.f : 1.f / sum;
  if (lane == 0) a.lse[r] = (most + log2f(sum)) * kLn2;
  if (lane * 4 >= a.D) return;
#pragma unroll
  for (int e = 0; e < 4; e++) v[e] *= inverse;
  const int64_t b = r / (a.H * a.S), h = r / a.S % a.H, t = r % a.S;
  store(static_cast<T*>(a.out) + flat_row(a.S, a.H, a.D, b, t, h) + lane * 4, v);
}
}  // namespace sail::cuda::sm80
