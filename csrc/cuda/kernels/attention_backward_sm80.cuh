// Attention backward with cp.async, ldmatrix and mma.sync: every card from sm_80 on. With P = 2^(scale log2(e) q k^T - lse)
// and delta = sum(dout * out) - dlse of every row:
//   dS = P * (dout v^T - delta)    dq = scale dS k    dk = scale dS^T q    dv = P^T dout
// Two kernels, each with its sums in registers, compute P and dS anew: seven products where five would do, but no sum
// over blocks, so neither atomics nor memory for partial sums. Both step through pairs of tiles, kSlots of them in shared
// memory, as attention_forward_sm80.cuh does through single ones.
#pragma once
#include "attention_config.h"
#include "attention_tile_sm80.cuh"

namespace sail::cuda::sm80 {
// stats[row] = (lse in base 2, sum(dout * out) - dlse): sixteen lanes a row. A row that saw no key has lse +inf, so that
// all its P are 0.
constexpr int kStatsThreads = 128;
template <class T> __global__ void __launch_bounds__(kStatsThreads) attention_stats_kernel(const AttentionBackward a) {
  const int lane = static_cast<int>(threadIdx.x) % 16;
  const int64_t row = blockIdx.x * int64_t{kStatsThreads / 16} + threadIdx.x / 16, R = a.rows();
  float sum = 0.f;
  if (row < R && lane * 8 < a.D) {
    float x[8], y[8];
    const int64_t at = row * a.D + lane * 8;
    load(static_cast<const T*>(a.dout) + at, x), load(static_cast<const T*>(a.out) + at, y);
#pragma unroll
    for (int e = 0; e < 8; e++) sum = fmaf(x[e], y[e], sum);
  }
#pragma unroll
  for (int o = 8; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  if (row >= R || lane) return;
  const int64_t h = row % a.H, t = row / a.H % a.S, b = row / a.H / a.S, at = (b * a.H + h) * a.S + t;
  const float lse = a.lse[at];
  reinterpret_cast<float2*>(a.stats)[at] = {lse == -INFINITY ? INFINITY : lse * kLog2E,
                                            a.dlse ? sum - a.dlse[at] : sum};
}

// Row `first` + m of dout's tile
template <class T>
__device__ __forceinline__ const T* dout_row(const AttentionBackward& a, const Sequence& s, int i, int head) {
  return static_cast<const T*>(a.dout) + flat_row(a.S, a.H, a.D, s.batch, s.q0 + i, head);
}

// dq of queries first .. first + count of one head, against keys 0 .. n1; query i sees the keys up to i + behind
struct QueryGradWork {
  Sequence s;
  int head, first, count, behind, n1;
};
template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    attention_query_grad_kernel(const AttentionBackward a) {
  constexpr int kF = Shape::kWarpM / 16;
  using Queries = HeadTile<Shape::kM, Shape::kD>;
  using Keys = HeadTile<Shape::kN, Shape::kD>;
  RowBlock block;
  if (!find_block<Shape::kM, true>(a, a.cu_q, a.S, a.H, &block)) return;
  const int D = static_cast<int>(a.D), g = block.head / static_cast<int>(a.H / a.G);
  const int mine = min(block.s.nq - block.first, Shape::kM), see = block.s.behind(a.causal);
  const QueryGradWork& w = share(
      QueryGradWork{block.s, block.head, block.first, mine, see, max(0, min(block.s.nk, block.first + mine + see))});
  const Sequence& s = w.s;

  const uint32_t queries = ptx::shared_address(dynamic_shared<char>()), gradients = queries + Queries::kBytes;
  const uint32_t ring = gradients + Queries::kBytes;
  const T *keys = row_of<T>(a.k, s.batch, s.k0, g), *values = row_of<T>(a.v, s.batch, s.k0, g);
  const auto load = [&](int there, uint32_t slot) {
    if (there > 0) {
      load_tile<T, Keys, Shape::kThreads>(slot, there, D, [&](int row) { return keys + row * a.k.token; });
      load_tile<T, Keys, Shape::kThreads>(slot + Keys::kBytes, there, D,
                                          [&](int row) { return values + row * a.v.token; });
    }
    ptx::cp_async_commit();
    keys += Shape::kN * a.k.token, values += Shape::kN * a.v.token;
  };
  int left = w.n1;
  if (left > 0) {
    load_tile<T, Queries, Shape::kThreads>(queries, w.count, D,
                                           [&](int m) { return row_of<T>(a.q, s.batch, s.q0 + w.first + m, w.head); });
    load_tile<T, Queries, Shape::kThreads>(gradients, w.count, D,
                                           [&](int m) { return dout_row<T>(a, s, w.first + m, w.head); });
  }
  static_assert(Shape::kSlots == 2);
  load(left, ring);

  const int warp_row = static_cast<int>(threadIdx.x) / 32 * Shape::kWarpM;
  const auto row = [&](int i, int octet) { return warp_row + 16 * i + 8 * octet + lane_row(); };
  __shared__ float2 stats[Shape::kM];
  for (int m = static_cast<int>(threadIdx.x); m < Shape::kM; m += Shape::kThreads) {
    stats[m] = {INFINITY, 0.f};  // P = 0
    if (m < w.count) stats[m] = reinterpret_cast<const float2*>(a.stats)[lse_at(a, s, w.first + m, w.head)];
  }
  const float scale = a.scale * kLog2E;
  Fragments<kF, Shape::kD> dq;
  clear(dq);
  uint32_t key_tile = ring;
  for (; left > 0; left -= Shape::kN) {
    ptx::cp_async_wait<Shape::kSlots - 2>();
    __syncthreads();
    const uint32_t other = 2 * ring + 2 * Keys::kBytes - key_tile;
    load(left - Shape::kN, other);
    Fragments<kF, Shape::kN> p, ds;
    clear(p), clear(ds);
    add_scores<T, Queries, Keys>(p, ptx::fresh(queries + warp_row * Queries::kPitch), key_tile);
    add_scores<T, Queries, Keys>(ds, ptx::fresh(gradients + warp_row * Queries::kPitch), key_tile + Keys::kBytes);
    const auto last = [&](int m) { return min(w.n1 - 1, w.first + m + w.behind) - (w.n1 - left); };
#pragma unroll
    for (int i = 0; i < kF; i++)
#pragma unroll
      for (int j = 0; j < Shape::kN / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) p[i][j][e] = ptx::exp2(fmaf(p[i][j][e], scale, -stats[row(i, e / 2)].x));
    if (last(warp_row) < Shape::kN - 1) {
#pragma unroll
      for (int i = 0; i < kF; i++)
#pragma unroll
        for (int octet = 0; octet < 2; octet++) mask(p[i], octet, last(row(i, octet)), 0.f);
    }
#pragma unroll
    for (int i = 0; i < kF; i++)
#pragma unroll
      for (int j = 0; j < Shape::kN / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) ds[i][j][e] = p[i][j][e] * (ds[i][j][e] - stats[row(i, e / 2)].y);
    Rounded<kF, Shape::kN> rounded;
    round_rows<T>(rounded, ds);
    add_product<T, Keys>(dq, rounded, key_tile);
    key_tile = other;
  }
  ptx::cp_async_wait<0>();
  const auto to = [&](int i, int octet) {
    const int m = row(i, octet);
    T* out = static_cast<T*>(a.dq) + flat_row(a.S, a.H, D, s.batch, s.q0 + w.first + m, w.head);
    return m < w.count ? out : nullptr;
  };
  store_rows(dq, D, to, [&](int, int) { return a.scale; });
}

// Blocks of kRows queries from `first` on, of all heads of a group in turn
template <int kRows> struct QueryWalk {
  int first, nq, head, i;
  __device__ __forceinline__ void next() {
    i += kRows;
    if (i >= nq) i = first, head++;
  }
};

// dk and dv of kM keys of one key/value head: sums over the queries of all its heads
template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    attention_key_grad_kernel(const AttentionBackward a) {
  constexpr int kF = Shape::kWarpM / 16;
  using Keys = HeadTile<Shape::kM, Shape::kD>;
  using Queries = HeadTile<Shape::kN, Shape::kD>;
  constexpr int kSlotBytes = 2 * Queries::kBytes + Shape::kN * 8;
  RowBlock block;
  if (!find_block<Shape::kM, false>(a, a.cu_k, a.L, a.G, &block)) return;
  const Sequence& s = block.s;
  const int D = static_cast<int>(a.D), group = static_cast<int>(a.H / a.G), g = block.head;
  const int count = min(s.nk - block.first, Shape::kM);
  const int behind = s.behind(a.causal);
  const int first = a.causal ? max(0, block.first - behind) / Shape::kN * Shape::kN : 0;
  const int steps = first < s.nq ? group * ((s.nq - first + Shape::kN - 1) / Shape::kN) : 0;

  const uint32_t keys = ptx::shared_address(dynamic_shared<char>()), values = keys + Keys::kBytes;
  const uint32_t ring = values + Keys::kBytes;
  QueryWalk<Shape::kN> loading = {first, s.nq, g * group, first};
  const auto load = [&](int step) {
    if (step < steps) {
      const uint32_t slot = ring + step % Shape::kSlots * kSlotBytes;
      const int i = loading.i, head = loading.head, there = s.nq - i;
      load_tile<T, Queries, Shape::kThreads>(slot, there, D,
                                             [&](int row) { return row_of<T>(a.q, s.batch, s.q0 + i + row, head); });
      load_tile<T, Queries, Shape::kThreads>(slot + Queries::kBytes, there, D,
                                             [&](int row) { return dout_row<T>(a, s, i + row, head); });
      const int row = static_cast<int>(threadIdx.x);
      if (row < Shape::kN)  // zeros past the last query: dout and q are zeros there, P is 1
        ptx::cp_async_8(slot + 2 * Queries::kBytes + row * 8,
                        a.stats + 2 * lse_at(a, s, row < there ? i + row : i, head), row < there ? 8 : 0);
      loading.next();
    }
    ptx::cp_async_commit();
  };
  if (steps) {
    load_tile<T, Keys, Shape::kThreads>(keys, count, D,
                                        [&](int row) { return row_of<T>(a.k, s.batch, s.k0 + block.first + row, g); });
    load_tile<T, Keys, Shape::kThreads>(values, count, D,
                                        [&](int row) { return row_of<T>(a.v, s.batch, s.k0 + block.first + row, g); });
  }
#pragma unroll
  for (int step = 0; step < Shape::kSlots - 1; step++) load(step);

  const int warp_row = static_cast<int>(threadIdx.x) / 32 * Shape::kWarpM;
  const float scale = a.scale * kLog2E;
  QueryWalk<Shape::kN> walk = {first, s.nq, g * group, first};
  Fragments<kF, Shape::kD> dk, dv;
  clear(dk), clear(dv);
  for (int step = 0; step < steps; step++, walk.next()) {
    ptx::cp_async_wait<Shape::kSlots - 2>();
    __syncthreads();
    load(step + Shape::kSlots - 1);
    const uint32_t slot = ring + step % Shape::kSlots * kSlotBytes, dout_tile = slot + Queries::kBytes;
    const float* stats = dynamic_shared<float>() + (slot - keys + 2 * Queries::kBytes) / 4 + 2 * lane_column();
    Fragments<kF, Shape::kN> p, ds;  // transposed: rows are keys
    clear(p);
    add_scores<T, Keys, Queries>(p, ptx::fresh(keys + warp_row * Keys::kPitch), slot);
    // key n and query i of the fragments' first element
    const int n = block.first + warp_row + lane_row(), i0 = walk.i + lane_column();
    const bool masked = block.first + warp_row + Shape::kWarpM - 1 - walk.i > behind;
#pragma unroll
    for (int j = 0; j < Shape::kN / 8; j++) {
      const float4 at = *reinterpret_cast<const float4*>(stats + 16 * j);
#pragma unroll
      for (int i = 0; i < kF; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          float& v = p[i][j][e];
          v = ptx::exp2(fmaf(v, scale, e % 2 ? -at.z : -at.x));
          if (masked && n + 16 * i + e / 2 * 8 - (i0 + 8 * j + e % 2) > behind) v = 0.f;
        }
    }
    Rounded<kF, Shape::kN> rounded;
    round_rows<T>(rounded, p);
    add_product<T, Queries>(dv, rounded, dout_tile);
    clear(ds);
    add_scores<T, Keys, Queries>(ds, ptx::fresh(values + warp_row * Keys::kPitch), dout_tile);
#pragma unroll
    for (int j = 0; j < Shape::kN / 8; j++) {
      const float4 at = *reinterpret_cast<const float4*>(stats + 16 * j);
#pragma unroll
      for (int i = 0; i < kF; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) ds[i][j][e] = p[i][j][e] * (ds[i][j][e] - (e % 2 ? at.w : at.y));
    }
    round_rows<T>(rounded, ds);
    add_product<T, Queries>(dk, rounded, slot);
  }
  ptx::cp_async_wait<0>();
  const auto to = [&](void* out) {
    return [&, out](int i, int octet) {
      const int m = warp_row + 16 * i + 8 * octet + lane_row();
      T* row = static_cast<T*>(out) + flat_row(a.L, a.G, D, s.batch, s.k0 + block.first + m, g);
      return m < count ? row : nullptr;
    };
  };
  store_rows(dk, D, to(a.dk), [&](int, int) { return a.scale; });
  store_rows(dv, D, to(a.dv), [](int, int) { return 1.f; });
}
}  // namespace sail::cuda::sm80
