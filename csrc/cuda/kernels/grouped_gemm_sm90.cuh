// Grouped GEMM for Hopper: persistent blocks of one producer and two consumer warp groups (TMA, wgmma).
//
//   producer    for every tile of this block and every 64 of K: waits for empty[slot], brings A and B into it
//               TMA: B, and A where its rows are contiguous, by one thread
//               cp.async: A where its rows are gathered (TMA gathers from sm_100 on), by the last two warps; of a
//               WgradProblem, by all four, and the rows that end within a step too (what follows is another expert's)
//   consumers   each 64 of the tile's 128 rows, all 256 columns: waits for full[slot], multiplies, and arrives at
//               empty[slot] a step later, when that wgmma is done; then the epilogue, straight from its 128 accumulators
//               In a RowsProblem only the producer looks for tiles; the first slot of one says which it is
//   full[i]     one arrival with the bytes that TMA brings; where rows may be copied, one of every thread that copies more
//   empty[i]    one arrival of every consumer warp that reads what this producer writes
// The producer runs ahead through the next tile while the consumers store. 128 x 256 reads 48 KB for 1024 clocks of
// wgmma; 128 x 128 by turns (ping-pong) would hide the epilogue but read 64 KB, more than the second-level cache gives.
//
// In a RowsProblem blocks 2 i and 2 i + 1 may be a cluster, a pair: they walk the same steps, of two row tiles that share
// B. Each brings one half of B to both, so that a block reads 32 KB a step, and a slot is free when the consumers of both
// have released it. Of a row tile that is left over they take two columns, without sharing. A pair leaves together.
#pragma once
#include "elements.cuh"
#include "epilogues.cuh"
#include "gemm_config.h"
#include "operand_sm90.cuh"
#include "tensor_box.h"
#include "tile_scheduler.h"

namespace sail::cuda::sm90 {
constexpr int kStages = 4, kProducers = 128, kGatherers = 64, kConsumerWarps = 8;
constexpr int kThreads = kProducers + 32 * kConsumerWarps;
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
static_assert(kProducers * kProducerRegisters + 32 * kConsumerWarps * kConsumerRegisters <= 65536);

struct Shared {
  alignas(kPatternBytes) unsigned char a[kStages][kTileM * kRowBytes];
  alignas(kPatternBytes) unsigned char b[kStages][kTileN * kRowBytes];
  uint64_t full[kStages], empty[kStages];
  RowTile tile[kStages];  // whose steps begin in the slot; expert < 0: there are no more
};
constexpr int kSharedBytes = sizeof(Shared) + kPatternBytes;  // dynamic shared memory is aligned to 16 bytes

__device__ __forceinline__ Shared& shared() {
  unsigned char* raw = dynamic_shared<unsigned char>();
  return *reinterpret_cast<Shared*>(raw + (-ptx::shared_address(raw) & (kPatternBytes - 1)));
}

// copiers: threads that arrive at full[i] with their cp.async
__device__ __forceinline__ void start(Shared& s, int copiers, int paired = 0) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; i++) {
      ptx::mbarrier_init(&s.full[i], 1 + copiers);
      ptx::mbarrier_init(&s.empty[i], kConsumerWarps << paired);
    }
    ptx::fence_mbarrier_init();
  }
  if (paired)
    ptx::cluster_sync();
  else
    __syncthreads();
}

// The slot of a step; producers and consumers walk the same steps.
struct Ring {
  int paired = 0;  // 1: the slots are filled by two blocks
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kStages) slot = 0, parity ^= 1;
  }
};

// This warp no longer reads the slot: says so to every block that writes into it, lane i to block i of a pair.
__device__ __forceinline__ void release(Shared& s, int slot, int paired) {
  const uint32_t lane = threadIdx.x % 32;
  if (!paired && lane == 0) ptx::mbarrier_arrive(&s.empty[slot]);
  if (paired && lane < 2) ptx::mbarrier_arrive_at(&s.empty[slot], lane);
}

// acc += A B over `steps` steps, of this warp group's 64 rows. copied: some bytes came by cp.async.
template <class T, bool kAlongM, bool kAlongN>
__device__ __forceinline__ void multiply(Shared& s, Ring& ring, int steps, bool copied, float (&acc)[kTileN / 2]) {
  const uint32_t a0 = ptx::shared_address(s.a) + (threadIdx.x / 128 - 1) * Operand<kAlongM>::kRows64Bytes;
  const uint32_t b0 = ptx::shared_address(s.b);
  int previous = 0;
  ptx::hold(acc);
  for (int i = 0; i < steps; i++) {
    ptx::mbarrier_wait(&s.full[ring.slot], ring.parity);
    if (copied) ptx::fence_proxy_async();
    const uint64_t a = Operand<kAlongM>::descriptor(a0 + ring.slot * sizeof(s.a[0]));
    const uint64_t b = Operand<kAlongN>::descriptor(b0 + ring.slot * sizeof(s.b[0]));
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTileK / 16; k++)
      ptx::wgmma<T, kTileN, true, kAlongM, kAlongN>(acc, a + k * (Operand<kAlongM>::kStepBytes >> 4),
                                                    b + k * (Operand<kAlongN>::kStepBytes >> 4));
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (i) release(s, previous, ring.paired);
    previous = ring.slot;
    ring.advance();
  }
  ptx::wgmma_wait<0>();
  ptx::hold(acc);
  if (steps) release(s, previous, ring.paired);
}

// Four eights of a row, of which lane q of its four takes the q-th.
__device__ __forceinline__ void fragment8(const float (&acc)[kTileN / 2], int first, int half, float (&v)[8]) {
  float2 quad[4];
#pragma unroll
  for (int t = 0; t < 4; t++) quad[t] = {acc[first + t * 4 + half * 2], acc[first + t * 4 + half * 2 + 1]};
  turn_quad(quad);
#pragma unroll
  for (int t = 0; t < 4; t++) v[2 * t] = quad[t].x, v[2 * t + 1] = quad[t].y;
}

// Gives this warp's products to the epilogue: rows [row, row_end) of C, 128 of them at most, columns from n on.
template <class Epilogue>
__device__ __forceinline__ void store(const Epilogue& epilogue, const float (&acc)[kTileN / 2], int e, int row,
                                      int row_end, int n) {
  constexpr int kColumns = Epilogue::kHalves ? kTileN / 2 : kTileN;
  const int thread = threadIdx.x - kProducers, lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int r = row + thread / 32 * 16 + lane / 4 + half * 8;
    const bool inside = r < row_end;
#pragma unroll
    for (int block = 0; block < kColumns; block += kDotColumns) {
      auto out = epilogue.row(e, inside ? r : Epilogue::kFinish ? -1 : row);
#pragma unroll
      for (int j = block; j < block + kDotColumns; j += 32) {
        float v[8];
        fragment8(acc, j / 2, half, v);
        const int column = n + j + lane % 4 * 8;
        if constexpr (Epilogue::kHalves) {
          float up[8];
          fragment8(acc, (j + kColumns) / 2, half, up);
          if (inside) out.store8(column, v, up);
        } else {
          if (inside) out.store8(column, v);
        }
      }
      if constexpr (Epilogue::kFinish) out.finish(n + block);
    }
  }
}

// Releases a slot that only announced a tile.
__device__ __forceinline__ void skip(Shared& s, Ring& ring) {
  __syncwarp();  // all lanes have read it
  release(s, ring.slot, ring.paired);
  ring.advance();
}

__device__ __forceinline__ void clear(float (&acc)[kTileN / 2]) {
#pragma unroll
  for (int i = 0; i < kTileN / 2; i++) acc[i] = 0.f;
}

// ---- C[r, n] = sum_k A[row(r), k] B[e][n, k]
template <class Out> struct RowsArguments {
  CUtensorMap a;     // unused where A is gathered
  CUtensorMap b[2];  // the two parts of B
  RowsProblem problem;
  Out out;
  int paired;  // 1: clusters of two blocks; 0: none
};

// Steps along K: those of B's first part, then those of its second, so that none has rows of both.
struct Steps {
  int split, first, total;
  SAIL_HD static constexpr Steps of(const RowsProblem& p) {
    const int64_t split = p.layout == Layout::kn && p.b.split < p.K ? p.b.split : p.K, first = ceil_div(split, kTileK);
    const int64_t total = first + ceil_div(p.K - split, kTileK);
    return {static_cast<int>(split), static_cast<int>(first), static_cast<int>(total)};
  }
};

__device__ __forceinline__ bool multiplies(const RowsProblem& p, const RowTile& t) {
  return t.expert >= 0 && t.expert < p.E;
}

// Calls step(tile, i, slot, parity) for every step of this block's tiles, by whole warps. tile.expert < 0: there are no
// more tiles, and in the one step of it and of the tail (expert E) nothing is multiplied.
template <class Out, class Step>
__device__ __forceinline__ void for_steps(const RowsArguments<Out>& args, int64_t n_tiles, const Step& step) {
  const RowsProblem& p = args.problem;
  const int steps = Steps::of(p).total;
  Ring ring;
  RowTiles tiles(p, kTileM, n_tiles, args.paired);
  RowTile t;
  for (int64_t tile = blockIdx.x >> args.paired;; tile += gridDim.x >> args.paired) {
    if (!tiles.find(tile, &t, blockIdx.x & args.paired)) t.expert = -1;
    const int count = multiplies(p, t) ? steps : 1;
    for (int i = 0; i < count; i++, ring.advance()) step(t, i, ring.slot, ring.parity);
    if (t.expert < 0) return;
  }
}
// By one warp: announces tiles, and brings B and contiguous rows of A.
template <bool kGated, Layout kLayout, class Out>
__device__ __forceinline__ void produce_boxes(const RowsArguments<Out>& args, Shared& s, int64_t n_tiles) {
  const bool gathers = args.problem.a.index != nullptr;
  const Steps steps = Steps::of(args.problem);
  for_steps(args, n_tiles, [&](const RowTile& t, int i, int slot, uint32_t parity) {
    if (threadIdx.x) return;
    const bool second = i >= steps.first, loads = multiplies(args.problem, t);
    const int part_k = (second ? i - steps.first : i) * kTileK, n = t.n * (kGated ? kTileN / 2 : kTileN);
    uint64_t* full = &s.full[slot];
    unsigned char *a = s.a[slot], *b = s.b[slot];
    ptx::mbarrier_wait(&s.empty[slot], parity ^ 1);
    if (i == 0) s.tile[slot] = t;
    ptx::mbarrier_arrive_expect(full, !loads ? 0 : gathers ? sizeof(s.b[0]) : sizeof(s.a[0]) + sizeof(s.b[0]));
    if (!loads) return;
    if (!gathers) ptx::tma_load(a, &args.a, full, second ? steps.split + part_k : part_k, t.row, 0);
    constexpr int kBoxes = kLayout == Layout::nk ? 2 : kTileN / kBoxElements;  // of B, 128 rows or 64 columns each
#pragma unroll
    for (int box = 0; box < kBoxes; box++) {
      const bool nk = kLayout == Layout::nk;
      const CUtensorMap* map = &args.b[nk ? kGated * box : second];
      unsigned char* to = b + box * (sizeof(s.b[0]) / kBoxes);
      const int x = nk ? part_k : n + box * kBoxElements, y = !nk ? part_k : kGated ? n : n + box * (kTileN / 2);
      if (!t.shares_b)
        ptx::tma_load(to, map, full, x, y, t.expert);
      else if (box / (kBoxes / 2) == (blockIdx.x & 1))
        ptx::tma_load_to(3, to, map, full, x, y, t.expert);
    }
  });
}

// By the last two warps of the producer: gathers rows of A.
template <class Out>
__device__ __forceinline__ void produce_gathered(const RowsArguments<Out>& args, Shared& s, int64_t n_tiles) {
  const Rows& from = args.problem.a;
  const int thread = threadIdx.x - (kProducers - kGatherers), lane = threadIdx.x % 32;
  const Steps steps = Steps::of(args.problem);
  int32_t rows[2] = {-1, -1};  // lane 8 j + i of a warp: those that its lanes 8 j .. 8 j + 7 copy in rounds i and i + 8
  for_steps(args, n_tiles, [&](const RowTile& t, int i, int slot, uint32_t parity) {
    if (!i && multiplies(args.problem, t)) {
#pragma unroll
      for (int part = 0; part < 2; part++) {
        const int r = t.row + thread / 8 + (lane % 8 + part * 8) * 8;
        rows[part] = r < t.row_end ? from.index[r] : -1;
      }
    }
    const int k = i >= steps.first ? steps.split + (i - steps.first) * kTileK : i * kTileK;
    ptx::mbarrier_wait(&s.empty[slot], parity ^ 1);
    if (multiplies(args.problem, t))
      copy_rows<kTileM, kGatherers>(ptx::shared_address(s.a[slot]), thread, [&](int round, int column) -> Chunk {
        const int32_t row = __shfl_sync(~0u, round < 8 ? rows[0] : rows[1], (lane & 24) | (round & 7));
        const int bytes = row < 0 ? 0 : chunk_bytes(static_cast<int>(args.problem.K) - k - column);
        const char* data = static_cast<const char*>(from.data);
        return {bytes ? data + (row * from.stride + (k + column)) * 2 : data, bytes};
      });
    ptx::mbarrier_arrive_cp_async(&s.full[slot]);
  });
}

template <class T, Layout kLayout, class Epilogue>
__global__ void __launch_bounds__(kThreads, 1)
    rows_kernel(const __grid_constant__ RowsArguments<typename Epilogue::Arguments> args) {
  constexpr int kColumns = Epilogue::kHalves ? kTileN / 2 : kTileN;
  const RowsProblem& p = args.problem;
  const int64_t n_tiles = ceil_div(p.N, kColumns);
  const bool gathers = p.a.index != nullptr;
  Shared& s = shared();
  start(s, gathers ? kGatherers : 0, args.paired);
  if (threadIdx.x < kProducers) {
    ptx::warpgroup_reg_dealloc<kProducerRegisters>();
    if (threadIdx.x < 32) produce_boxes<Epilogue::kHalves, kLayout>(args, s, n_tiles);
    if (gathers && threadIdx.x >= kProducers - kGatherers) produce_gathered(args, s, n_tiles);
  } else {
    ptx::warpgroup_reg_alloc<kConsumerRegisters>();
    const Epilogue epilogue(p, args.out);
    const int steps = Steps::of(p).total;
    Ring ring{args.paired};
    for (;;) {
      ptx::mbarrier_wait(&s.full[ring.slot], ring.parity);
      const RowTile t = s.tile[ring.slot];
      if (t.expert < 0) break;
      float acc[kTileN / 2];
      clear(acc);
      multiply<T, false, kLayout == Layout::kn>(s, ring, t.expert < p.E ? steps : 0, gathers, acc);
      if (t.expert == p.E) skip(s, ring);
      store(epilogue, acc, t.expert, t.row, t.row_end, t.n * kColumns);
    }
  }
  if (args.paired) ptx::cluster_sync();  // the other block arrives at barriers of ours until it is done
}

// ---- C[e][m, n] = sum_r A[row_a(r), m] B[row_b(r), n]
struct WgradArguments {
  CUtensorMap a, b;  // unused where gathered
  WgradProblem problem;
  StoreGrad out;
};

// Panels of 64 columns from column m on, of 64 rows: rows[i] is row thread / 8 + 16 i of them, negative: zeros.
template <int kPanels>
__device__ __forceinline__ void copy_panels(const Rows& from, const int32_t (&rows)[4], int m, int width, uint32_t to,
                                            int thread) {
  const char* data = static_cast<const char*>(from.data);
#pragma unroll
  for (int panel = 0; panel < kPanels; panel++)
    copy_rows<kTileK, kProducers>(to + panel * kPanelBytes, thread, [&](int j, int column) -> Chunk {
      const int at = m + panel * kBoxElements + column;
      const int bytes = rows[j] < 0 ? 0 : chunk_bytes(width - at);
      return {bytes ? data + (rows[j] * from.stride + at) * 2 : data, bytes};
    });
}

// One operand's share of a step: rows [r, r + 64) of an expert that ends at row_end.
template <int kPanels>
__device__ __forceinline__ void load_panels(const Rows& from, const CUtensorMap* map, int r, int row_end, int m,
                                            int width, unsigned char* to, uint64_t* full, int thread) {
  if (!from.index && r + kTileK <= row_end) {
    if (thread) return;
    for (int panel = 0; panel < kPanels; panel++)
      ptx::tma_load(to + panel * kPanelBytes, map, full, m + panel * kBoxElements, r, 0);
    return;
  }
  int32_t rows[kTileK / 16];
#pragma unroll
  for (int i = 0; i < kTileK / 16; i++) {
    const int at = r + thread / 8 + i * 16;
    rows[i] = at < row_end ? static_cast<int32_t>(from.row(at)) : -1;
  }
  copy_panels<kPanels>(from, rows, m, width, ptx::shared_address(to), thread);
}

__device__ __forceinline__ void produce_wgrad(const WgradArguments& args, Shared& s, int64_t m_tiles, int64_t n_tiles) {
  const WgradProblem& p = args.problem;
  const int thread = threadIdx.x;
  Ring ring;
  for (int64_t tile = blockIdx.x; tile < p.E * m_tiles * n_tiles; tile += gridDim.x) {
    const WgradTile t = wgrad_tile(tile, m_tiles, n_tiles);
    const int m = static_cast<int>(t.m) * kTileM, n = static_cast<int>(t.n) * kTileN, row_end = p.offsets[t.expert + 1];
    for (int r = p.offsets[t.expert]; r < row_end; r += kTileK, ring.advance()) {
      uint64_t* full = &s.full[ring.slot];
      const bool whole = r + kTileK <= row_end;
      ptx::mbarrier_wait(&s.empty[ring.slot], ring.parity ^ 1);
      if (thread == 0)
        ptx::mbarrier_arrive_expect(
            full, (whole && !p.a.index ? sizeof(s.a[0]) : 0) + (whole && !p.b.index ? sizeof(s.b[0]) : 0));
      load_panels<kTileM / kBoxElements>(p.a, &args.a, r, row_end, m, static_cast<int>(p.M), s.a[ring.slot], full,
                                         thread);
      load_panels<kTileN / kBoxElements>(p.b, &args.b, r, row_end, n, static_cast<int>(p.N), s.b[ring.slot], full,
                                         thread);
      ptx::mbarrier_arrive_cp_async(full);
    }
  }
}

template <class T> __global__ void __launch_bounds__(kThreads, 1)
    wgrad_kernel(const __grid_constant__ WgradArguments args) {
  const WgradProblem& p = args.problem;
  const int64_t m_tiles = ceil_div(p.M, kTileM), n_tiles = ceil_div(p.N, kTileN);
  Shared& s = shared();
  start(s, kProducers);
  if (threadIdx.x < kProducers) {
    ptx::warpgroup_reg_dealloc<kProducerRegisters>();
    produce_wgrad(args, s, m_tiles, n_tiles);
  } else {
    ptx::warpgroup_reg_alloc<kConsumerRegisters>();
    const StoreGrad& out = args.out;
    Ring ring;
    for (int64_t tile = blockIdx.x; tile < p.E * m_tiles * n_tiles; tile += gridDim.x) {
      const WgradTile t = wgrad_tile(tile, m_tiles, n_tiles);
      const int steps = (p.offsets[t.expert + 1] - p.offsets[t.expert] + kTileK - 1) / kTileK;
      float acc[kTileN / 2];
      clear(acc);
      multiply<T, true, true>(s, ring, steps, true, acc);
      if (!steps && out.accumulate) continue;
      const int e = static_cast<int>(t.expert), m = static_cast<int>(t.m) * kTileM, n = static_cast<int>(t.n) * kTileN;
      const auto keep = [&](const auto& to) { store(to, acc, e, m, static_cast<int>(p.M), n); };
      if (out.fp32 && out.accumulate) keep(StoreGradEpilogue<float, true, true>(p, out));
      if (out.fp32 && !out.accumulate) keep(StoreGradEpilogue<float, false, true>(p, out));
      if (!out.fp32 && out.accumulate) keep(StoreGradEpilogue<T, true, true>(p, out));
      if (!out.fp32 && !out.accumulate) keep(StoreGradEpilogue<T, false, true>(p, out));
    }
  }
}
}  // namespace sail::cuda::sm90
