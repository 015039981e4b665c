// Attention forward for Hopper: one producer and two or three consumer warp groups (TMA, wgmma) to a block.
//
//   producer    one thread brings the block's queries, then keys and values of one tile after the other: K0 V0 K1 V1 ...
//               Where the tile at a sequence's end holds values of the next one, which may be NaN and meet probabilities
//               of 0, all 128 threads bring that one by cp.async instead, with zeros in their place
//   consumers   each 64 queries of one head, whose scores, probabilities, maxima, sums and results stay in registers.
//               Step i multiplies keys of tile i and values of tile i - 1, so that the softmax of tile i runs beside the
//               second product; and the groups multiply by turns, so that it runs beside the others' products too
//   full[i]     one arrival, with the bytes of a tile;  queries_full, copied: the same for queries, for what was copied
//   empty[i]    one arrival of every consumer warp
//   barrier 1 + g   group g's turn: itself and the group before it
//
// In shared memory everything lies in rows of 128 swizzled bytes (operand_sm90.cuh), 64 columns of a head:
//   queries, keys   [64 columns][rows]              operands along K
//   values          [64 rows][64 columns][64 rows]  an operand along N, of 64 keys at a time
#pragma once
#include "attention_config.h"
#include "attention_rows.cuh"
#include "attention_softmax.cuh"
#include "operand_sm90.cuh"
#include "tensor_box.h"

namespace sail::cuda::sm90 {
struct ForwardArguments {
  CUtensorMap q, k, v;  // [batches, tokens, heads, D]
  AttentionForward problem;
};

template <class Shape> struct ForwardShared {
  alignas(kPatternBytes) unsigned char queries[Shape::kQueryBytes];
  alignas(kPatternBytes) unsigned char tiles[Shape::kSlots][Shape::kTileBytes];
  uint64_t full[Shape::kSlots], empty[Shape::kSlots], queries_full, copied;
  static constexpr int kBytes = Shape::kQueryBytes + Shape::kSlots * (Shape::kTileBytes + 16) + 16 + kPatternBytes;

  static __device__ __forceinline__ ForwardShared& get() {
    unsigned char* raw = dynamic_shared<unsigned char>();
    return *reinterpret_cast<ForwardShared*>(raw + (-ptx::shared_address(raw) & (kPatternBytes - 1)));
  }
  __device__ __forceinline__ void start() {
    for (int i = 0; i < Shape::kSlots; i++) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], 4 * Shape::kGroups);
    }
    ptx::mbarrier_init(&queries_full, 1);
    ptx::mbarrier_init(&copied, 128);
    ptx::fence_mbarrier_init();
  }

  // Tiles are numbered: 2 i has the keys of tile i, 2 i + 1 the values.
  static __device__ __forceinline__ int slot(int tile) { return tile % Shape::kSlots; }
  static __device__ __forceinline__ uint32_t parity(int tile) { return tile / Shape::kSlots & 1; }
  __device__ __forceinline__ void wait_full(int tile) { ptx::mbarrier_wait(&full[slot(tile)], parity(tile)); }
  __device__ __forceinline__ void wait_empty(int tile) { ptx::mbarrier_wait(&empty[slot(tile)], parity(tile) ^ 1); }
  __device__ __forceinline__ void release(int tile) {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&empty[slot(tile)]);
  }
};

// Queries first .. first + count of a sequence against its keys 0 .. end, in tiles; query i sees those up to i + behind.
struct ForwardWork {
  Sequence s;
  int head, g, first, count, behind, end, tiles;
  bool copies;  // the values of the last tile
};

template <class Shape> __device__ __forceinline__ bool find_work(const AttentionForward& a, ForwardWork* w) {
  RowBlock block;
  if (!find_block<Shape::kM, true>(a, a.cu_q, a.S, a.H, &block)) return false;
  const Sequence& s = block.s;
  const int count = min(s.nq - block.first, Shape::kM), behind = s.behind(a.causal);
  const int end = max(0, min(s.nk, block.first + count + behind)), tiles = (end + Shape::kN - 1) / Shape::kN;
  const bool copies = tiles * Shape::kN > s.nk && s.k0 + s.nk < a.L;
  *w = {s, block.head, block.head / static_cast<int>(a.H / a.G), block.first, count, behind, end, tiles, copies};
  return true;
}

// ---- producer
// 64 columns of a head, those of panel `panel`, from `token` on.
__device__ __forceinline__ void load_box(unsigned char* to, const CUtensorMap& map, uint64_t* full, int panel,
                                         int token, int head, int batch) {
  ptx::tma_load(to, &map, full, panel * kBoxElements, head, token, batch);
}

template <class Shape>
__device__ __forceinline__ void load_tile(const ForwardArguments& args, ForwardShared<Shape>& s, const ForwardWork& w,
                                          int tile) {
  uint64_t* full = &s.full[s.slot(tile)];
  unsigned char* to = s.tiles[s.slot(tile)];
  const int key = w.s.k0 + tile / 2 * Shape::kN;
  s.wait_empty(tile);
  ptx::mbarrier_arrive_expect(full, Shape::kTileBytes);
#pragma unroll
  for (int panel = 0; panel < Shape::kPanels; panel++)
    if (tile % 2 == 0) {
      load_box(to + panel * Shape::kN * kRowBytes, args.k, full, panel, key, w.g, w.s.batch);
    } else {
#pragma unroll
      for (int half = 0; half < Shape::kN / 64; half++)
        load_box(to + (half * Shape::kPanels + panel) * kPanelBytes, args.v, full, panel, key + half * 64, w.g,
                 w.s.batch);
    }
}

// Values of the last tile, zeros from the sequence's end on.
template <class T, class Shape>
__device__ __forceinline__ void copy_values(const AttentionForward& a, ForwardShared<Shape>& s, const ForwardWork& w) {
  const int tile = 2 * w.tiles - 1, key = (w.tiles - 1) * Shape::kN;
  const uint32_t to = ptx::shared_address(s.tiles[s.slot(tile)]);
  const T* values = row_of<T>(a.v, w.s.batch, w.s.k0, w.g);
  s.wait_empty(tile);
  for (int i = 0; i < Shape::kN / 64 * Shape::kPanels; i++) {
    const int first_row = key + i / Shape::kPanels * 64, first_column = i % Shape::kPanels * 64;
    copy_rows<64, 128>(to + i * kPanelBytes, static_cast<int>(threadIdx.x), [&](int round, int column) -> Chunk {
      const int row = first_row + static_cast<int>(threadIdx.x) / 8 + round * 16, at = first_column + column;
      const bool there = row < w.s.nk && at < a.D;
      return {there ? values + row * a.v.token + at : values, there ? 16 : 0};
    });
  }
  ptx::mbarrier_arrive_cp_async(&s.copied);
}

template <class T, class Shape>
__device__ __forceinline__ void produce(const ForwardArguments& args, ForwardShared<Shape>& s, const ForwardWork& w) {
  if (!w.tiles) return;
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(&s.queries_full, Shape::kQueryBytes);
    for (int panel = 0; panel < Shape::kPanels; panel++)
      load_box(s.queries + panel * Shape::kM * kRowBytes, args.q, &s.queries_full, panel, w.s.q0 + w.first, w.head,
               w.s.batch);
    for (int tile = 0; tile < 2 * w.tiles - w.copies; tile++) load_tile(args, s, w, tile);
  }
  __syncwarp();
  if (w.copies) copy_values<T>(args.problem, s, w);
}

// ---- consumers
// The accumulators as wgmma names them
template <int kN8> using Flat = float[kN8 * 4];
template <int kN8> __device__ __forceinline__ Flat<kN8>& flat(float (&c)[1][kN8][4]) {
  return reinterpret_cast<Flat<kN8>&>(c);
}

// Starts scores = Q K^T of this group's queries and tile i.
template <class T, class Shape>
__device__ __forceinline__ void start_scores(ForwardShared<Shape>& s, int i, int group,
                                             Fragments<1, Shape::kN>& scores) {
  s.wait_full(2 * i);
  const uint32_t queries = ptx::shared_address(s.queries) + group * Operand<false>::kRows64Bytes;
  const uint32_t keys = ptx::shared_address(s.tiles[s.slot(2 * i)]);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < Shape::kD / 16; k++) {
    const uint32_t right = k % 4 * Operand<false>::kStepBytes;
    const uint64_t a = Operand<false>::descriptor(queries + k / 4 * Shape::kM * kRowBytes + right);
    const uint64_t b = Operand<false>::descriptor(keys + k / 4 * Shape::kN * kRowBytes + right);
    if (k == 0) ptx::wgmma<T, Shape::kN, false, false, false>(flat(scores), a, b);
    if (k != 0) ptx::wgmma<T, Shape::kN, true, false, false>(flat(scores), a, b);
  }
  ptx::wgmma_commit();
}

template <class Shape>
__device__ __forceinline__ void wait_values(ForwardShared<Shape>& s, const ForwardWork& w, int i) {
  if (w.copies && i + 1 == w.tiles) {
    ptx::mbarrier_wait(&s.copied, 0);
    ptx::fence_proxy_async();
  } else {
    s.wait_full(2 * i + 1);
  }
}
// Starts o += P V with the values of tile i, which have come.
template <class T, class Shape>
__device__ __forceinline__ void start_product(ForwardShared<Shape>& s, int i, Rounded<1, Shape::kN>& p,
                                              Fragments<1, Shape::kD>& o) {
  const uint32_t values = ptx::shared_address(s.tiles[s.slot(2 * i + 1)]);
  ptx::hold(flat(o));
#pragma unroll
  for (int k = 0; k < Shape::kN / 16; k++) ptx::hold(p[0][k]);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < Shape::kN / 16; k++) {
    const uint32_t at = k / 4 * Shape::kPanels * kPanelBytes + k % 4 * Operand<true>::kStepBytes;
    ptx::wgmma<T, Shape::kD, true, true>(flat(o), p[0][k], Operand<true>::descriptor(values + at));
  }
  ptx::wgmma_commit();
}

// One group multiplies at a time, 0 first; each hands over to the next.
template <class Shape> struct Turns {
  int group;
  __device__ __forceinline__ void take(bool first) const {
    if (group || !first) ptx::named_barrier(1 + group, 256);
  }
  __device__ __forceinline__ void pass(bool last) const {
    const int next = group + 1 == Shape::kGroups ? 0 : group + 1;
    if (next || !last) ptx::named_barrier_arrive(1 + next, 256);
  }
};

template <class T, class Shape>
__device__ __forceinline__ void consume(const AttentionForward& a, ForwardShared<Shape>& s, const ForwardWork& w) {
  const int group = static_cast<int>(threadIdx.x) / 128 - 1;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16 - 64;
  const float scale = fmaxf(fabsf(a.scale) * kLog2E, 1e-30f);  // positive: a masked score is -inf
  const auto row = [&](int octet) { return warp_row + 8 * octet + lane_row(); };
  const Turns<Shape> turns{group};
  Softmax<1> softmax;
  Fragments<1, Shape::kD> o;
  clear(o);
  if (w.tiles) {
    Fragments<1, Shape::kN> p;
    Rounded<1, Shape::kN> rounded;
    const auto probabilities = [&](int i) {
      if (a.scale < 0) negate(p);
      const auto last = [&](int m) { return min(w.end - 1, w.first + m + w.behind) - i * Shape::kN; };
      if (last(warp_row) < Shape::kN - 1) {
#pragma unroll
        for (int octet = 0; octet < 2; octet++) mask(p[0], octet, last(row(octet)), -INFINITY);
      }
      softmax.update(p, scale);
    };
    ptx::mbarrier_wait(&s.queries_full, 0);
    start_scores<T>(s, 0, group, p);
    ptx::wgmma_wait<0>();
    ptx::hold(flat(p));
    s.release(0);
    probabilities(0);
    wait_values(s, w, 0);
    round_rows<T>(rounded, p);
    for (int i = 1; i < w.tiles; i++) {
      turns.take(i == 1);
      start_scores<T>(s, i, group, p);
      start_product<T>(s, i - 1, rounded, o);
      turns.pass(i + 1 == w.tiles);
      ptx::wgmma_wait<1>();
      ptx::hold(flat(p));
      s.release(2 * i);
      probabilities(i);
      wait_values(s, w, i);  // here, as a loop keeps ptxas from waiting for the product before it computes the softmax
      ptx::wgmma_wait<0>();
      ptx::hold(flat(o));
      s.release(2 * i - 1);
      softmax.rescale(o);
      round_rows<T>(rounded, p);
    }
    start_product<T>(s, w.tiles - 1, rounded, o);
    ptx::wgmma_wait<0>();
    ptx::hold(flat(o));
  }

  softmax.finish();
  T* out = static_cast<T*>(a.out) + flat_row(a.S, a.H, a.D, w.s.batch, w.s.q0 + w.first, w.head);
#pragma unroll
  for (int octet = 0; octet < 2; octet++)
    if (row(octet) < w.count && threadIdx.x % 4 == 0)
      a.lse[lse_at(a, w.s, w.first + row(octet), w.head)] = softmax.log2_sum(0, octet, scale) * kLn2;
  store_rows(
      o, static_cast<int>(a.D),
      [&](int, int octet) { return row(octet) < w.count ? out + row(octet) * a.H * a.D : nullptr; },
      [&](int, int octet) { return softmax.inverse(0, octet); });
}

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    attention_forward_kernel(const __grid_constant__ ForwardArguments args) {
  ForwardWork mine;
  if (!find_work<Shape>(args.problem, &mine)) return;
  ForwardShared<Shape>& s = ForwardShared<Shape>::get();
  if (threadIdx.x == 0) s.start();
  const ForwardWork& w = share(mine);
  if (threadIdx.x < 128) {
    ptx::warpgroup_reg_dealloc<Shape::kProducerRegisters>();
    produce<T>(args, s, w);
  } else {
    ptx::warpgroup_reg_alloc<Shape::kConsumerRegisters>();
    consume<T>(args.problem, s, w);
  }
}
}  // namespace sail::cuda::sm90
