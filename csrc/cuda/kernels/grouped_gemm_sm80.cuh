// Grouped GEMM with cp.async, ldmatrix and mma.sync: every card from sm_80 on.
//
// All warps of a block do the same: a tile is computed in steps of kK along k. Shared memory holds kStages steps; in
// step s the block waits for its own copies of step s (cp_async_wait), meets (so that all copies are there, and nobody
// reads the stage of step s - 1 any more), starts the copies of step s + kStages - 1 into that stage, and multiplies.
// Copies past the last step are empty groups, so that the number to wait for never changes. Blocks are persistent and
// keep no state between tiles; while one stores its tile, the other block of the multiprocessor computes.
#pragma once
#include "epilogues.cuh"
#include "operands_sm80.cuh"

namespace sail::cuda::sm80 {
// A warp's share of a tile, in fragments of mma: [16 rows][8 columns][4 a lane]
template <class Shape> struct Products {
  static constexpr int kRows = Shape::kWarpM / 16, kColumns = Shape::kWarpN / 8;
  float c[kRows][kColumns][4] = {};
};

template <class Shape> __device__ __forceinline__ int warp_row() {
  return static_cast<int>(threadIdx.x) / 32 / Shape::kWarpsN * Shape::kWarpM;
}
template <class Shape> __device__ __forceinline__ int warp_column() {
  return static_cast<int>(threadIdx.x) / 32 % Shape::kWarpsN * Shape::kWarpN;
}

// One operand's tile; kTransposed: its rows are k
template <int kOuter, int kK, bool kTransposed>
using OperandTile = SharedTile<kTransposed ? kK : kOuter, kTransposed ? kOuter : kK>;

template <class T, class Shape, bool kTransposedA, bool kTransposedB> struct Mainloop {
  using TileA = OperandTile<Shape::kM, Shape::kK, kTransposedA>;
  using TileB = OperandTile<Shape::kN, Shape::kK, kTransposedB>;
  static constexpr int kStageBytes = TileA::kBytes + TileB::kBytes;
  static_assert(kStageBytes * Shape::kStages == Shape::kSharedBytes);

  char* shared = dynamic_shared<char>();
  BlockReader<TileA, kTransposedA, true> read_a{warp_row<Shape>()};
  BlockReader<TileB, kTransposedB, false> read_b{warp_column<Shape>()};

  __device__ __forceinline__ void multiply(Products<Shape>& products, int stage) const {
    const uint32_t a_tile = ptx::shared_address(shared) + stage * kStageBytes, b_tile = a_tile + TileA::kBytes;
    constexpr int kA = Shape::kWarpM / 16, kB = Shape::kWarpN / 16;
#pragma unroll
    for (int step = 0; step < Shape::kK / 16; step++) {
      uint32_t a[kA][4], b[kB][4];
#pragma unroll
      for (int i = 0; i < kA; i++) read_a.read(a[i], a_tile, i, step);
#pragma unroll
      for (int j = 0; j < kB; j++) read_b.read(b[j], b_tile, j, step);
#pragma unroll
      for (int i = 0; i < kA; i++)
#pragma unroll
        for (int j = 0; j < 2 * kB; j++)
          ptx::mma<T>(products.c[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }

  // Adds the products of K elements.
  template <class A, class B>
  __device__ __forceinline__ void run(Products<Shape>& products, A& load_a, B& load_b, int K) const {
    const int steps = K / Shape::kK + (K % Shape::kK != 0);
    const auto load = [&](int step) {
      if (step < steps) {
        char* stage = shared + step % Shape::kStages * kStageBytes;
        load_a.load(stage, step * Shape::kK);
        load_b.load(stage + TileA::kBytes, step * Shape::kK);
      }
      ptx::cp_async_commit();
    };
    __syncthreads();  // the last tile's stages are no longer read
#pragma unroll
    for (int step = 0; step < Shape::kStages - 1; step++) load(step);
    for (int step = 0; step < steps; step++) {
      ptx::cp_async_wait<Shape::kStages - 2>();
      __syncthreads();
      load(step + Shape::kStages - 1);
      multiply(products, step % Shape::kStages);
    }
  }
};

// This lane's eight of the 32 columns from block `first`, every `step`-th block of 8 being one of them.
template <class Shape>
__device__ __forceinline__ void fragment8(const Products<Shape>& products, int i, int half, int first, int step,
                                          float (&v)[8]) {
  float2 pairs[4];
#pragma unroll
  for (int t = 0; t < 4; t++) {
    const float (&c)[4] = products.c[i][first + t * step];
    pairs[t] = {c[half * 2], c[half * 2 + 1]};
  }
  turn_quad(pairs);
#pragma unroll
  for (int t = 0; t < 4; t++) v[2 * t] = pairs[t].x, v[2 * t + 1] = pairs[t].y;
}

// Hands the columns of rows row .. row_end to the epilogue; column: the tile's first, of a half for kHalves.
template <class Shape, class Epilogue>
__device__ __forceinline__ void store(const Epilogue& epilogue, const Products<Shape>& products, int e, int row,
                                      int row_end, int column) {
  using P = Products<Shape>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int first = column + warp_column<Shape>() / (Epilogue::kHalves ? 2 : 1);
#pragma unroll
  for (int i = 0; i < P::kRows; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = row + warp_row<Shape>() + i * 16 + half * 8 + lane / 4;
      const bool stored = r < row_end;
      auto out = epilogue.row(e, stored ? r : Epilogue::kFinish ? -1 : row);
      if constexpr (Epilogue::kHalves) {
        float gate[8], up[8];
        fragment8(products, i, half, 0, 2, gate), fragment8(products, i, half, 1, 2, up);
        if (stored) out.store8(first + lane % 4 * 8, gate, up);
      } else {
#pragma unroll
        for (int j = 0; j < P::kColumns; j += 4) {
          float v[8];
          fragment8(products, i, half, j, 1, v);
          if (stored) out.store8(first + (j + lane % 4) * 8, v);
        }
      }
      if constexpr (Epilogue::kFinish) out.finish(first);
    }
}

// For kHalves the columns of a tile are 8 of gate, the same 8 of up, the next 8 of gate, ...: both halves of a pair of
// columns then lie in one thread's fragments, whatever the warp's share.
template <class T, class Shape, Layout kLayout, bool kAligned, class Epilogue>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    rows_kernel(const RowsProblem p, const typename Epilogue::Arguments arguments) {
  constexpr bool kTransposedB = kLayout == Layout::kn;
  constexpr int kColumns = Epilogue::kHalves ? Shape::kN / 2 : Shape::kN;
  using Loop = Mainloop<T, Shape, false, kTransposedB>;
  const Epilogue epilogue(p, arguments);
  const Loop loop;
  RowTiles tiles(p, Shape::kM, ceil_div(p.N, kColumns));
  RowTile tile;
  for (int64_t i = blockIdx.x; tiles.find(i, &tile); i += gridDim.x) {
    const int column = tile.n * kColumns;
    const int64_t e = tile.expert < p.E ? tile.expert : 0;
    const int K = tile.expert < p.E ? static_cast<int>(p.K) : 0, N = static_cast<int>(p.N);  // the tail: K = 0, zeros
    const T *a = static_cast<const T*>(p.a.data), *first = static_cast<const T*>(p.b.first) + e * p.b.expert_stride;
    const T* second = p.b.second ? static_cast<const T*>(p.b.second) + e * p.b.expert_stride : nullptr;

    FixedRows<T, typename Loop::TileA, Shape::kThreads, kAligned> load_a;
    load_a.start(K, a, [&](int m) -> const T* {
      const int r = tile.row + m;
      return K && r < tile.row_end ? a + p.a.row(r) * p.a.stride : nullptr;
    });
    Products<Shape> products;
    if constexpr (kTransposedB) {
      using Source = WeightRows<T>;
      MovingRows<T, typename Loop::TileB, Shape::kThreads, kAligned, Source> load_b(
          Source(first, second, p.b.row_stride, p.b.split), K, column, N);
      loop.run(products, load_a, load_b, K);
    } else {
      FixedRows<T, typename Loop::TileB, Shape::kThreads, kAligned> load_b;
      load_b.start(K, first, [&](int j) -> const T* {
        const int n = column + (Epilogue::kHalves ? j / 16 * 8 + j % 8 : j);
        if (n >= N) return nullptr;
        if constexpr (Epilogue::kHalves) return (j / 8 % 2 ? second : first) + n * p.b.row_stride;
        return n < p.b.split ? first + n * p.b.row_stride : second + (n - p.b.split) * p.b.row_stride;
      });
      loop.run(products, load_a, load_b, K);
    }
    store<Shape>(epilogue, products, tile.expert, tile.row, tile.row_end, column);
  }
}

template <class T, class Tile, int kThreads, bool kAligned>
using GatheredOperand = MovingRows<T, Tile, kThreads, kAligned,
                                   IndexedRows<T, Share<Tile, kThreads>::kCount, Share<Tile, kThreads>::kStep>>;

template <class T, class Shape, bool kAligned>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    wgrad_kernel(const WgradProblem p, const StoreGrad arguments) {
  using Loop = Mainloop<T, Shape, true, true>;
  const Loop loop;
  const int64_t m_tiles = ceil_div(p.M, Shape::kM), n_tiles = ceil_div(p.N, Shape::kN);
  for (int64_t i = blockIdx.x; i < p.E * m_tiles * n_tiles; i += gridDim.x) {
    const WgradTile tile = wgrad_tile(i, m_tiles, n_tiles);
    const int begin = p.offsets[tile.expert], rows = p.offsets[tile.expert + 1] - begin;
    if (!rows && arguments.accumulate) continue;
    const int m = static_cast<int>(tile.m) * Shape::kM, n = static_cast<int>(tile.n) * Shape::kN;
    const int M = static_cast<int>(p.M), N = static_cast<int>(p.N);
    GatheredOperand<T, typename Loop::TileA, Shape::kThreads, kAligned> load_a({p.a, begin}, rows, m, M);
    GatheredOperand<T, typename Loop::TileB, Shape::kThreads, kAligned> load_b({p.b, begin}, rows, n, N);
    Products<Shape> products;
    loop.run(products, load_a, load_b, rows);
    const auto keep = [&](const auto& epilogue) {
      store<Shape>(epilogue, products, static_cast<int>(tile.expert), m, M, n);
    };
    if (arguments.fp32 && arguments.accumulate) keep(StoreGradEpilogue<float, true, kAligned>(p, arguments));
    if (arguments.fp32 && !arguments.accumulate) keep(StoreGradEpilogue<float, false, kAligned>(p, arguments));
    if (!arguments.fp32 && arguments.accumulate) keep(StoreGradEpilogue<T, true, kAligned>(p, arguments));
    if (!arguments.fp32 && !arguments.accumulate) keep(StoreGradEpilogue<T, false, kAligned>(p, arguments));
  }
}
}  // namespace sail::cuda::sm80
