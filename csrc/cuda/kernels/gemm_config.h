// Tile shapes of the grouped GEMMs and the choice among those of grouped_gemm_sm80.cuh. No card has run them: the reasons
// are counted, not measured (docs/decisions/moe-cuda.md).
#pragma once
#include "tile_scheduler.h"

namespace sail::cuda::sm80 {
// A block computes kM x kN outputs in steps of kK, its warps side by side, with kStages steps in shared memory.
template <int M, int N, int K, int WarpsM, int WarpsN, int Stages, int Blocks> struct TileShape {
  static constexpr int kM = M, kN = N, kK = K, kWarpsM = WarpsM, kWarpsN = WarpsN, kStages = Stages;
  static constexpr int kWarpM = M / WarpsM, kWarpN = N / WarpsN, kThreads = 32 * WarpsM * WarpsN;
  static constexpr int kBlocks = Blocks;  // of a multiprocessor: bounds the registers
  static constexpr int kSharedBytes = Stages * (M + N) * K * 2;
  static_assert(kWarpN == kDotColumns, "GatedBackward sums a row over one warp's columns");
  static_assert(kSharedBytes <= 99 * 1024, "sm_86 and sm_89 give a block 99 KB");
};
// 64 x 64 a warp: 4 KB from shared memory for 64 clocks of mma; 64 x 32 would need 3 KB for 32, more than the 128 bytes
// a clock that there are once the copies into it are added. 64 KB: two blocks on an A100 or H100, so that one computes
// while the other stores or waits; one on sm_86 and sm_89.
using Large = TileShape<128, 128, 32, 2, 2, 4, 2>;
// From about 24 to 96 rows an expert, where Large computes more padding than products. 48 KB.
using Medium = TileShape<64, 128, 32, 2, 2, 4, 3>;
// The same for what needs more than the 168 registers of three blocks: GatedBackward, and operands without alignment.
using Roomy = TileShape<64, 128, 32, 2, 2, 4, 2>;
// Up to 16 rows an expert: bound by reading the weights, of which 3 x 17 KB a block are under way. 68 KB.
using Small = TileShape<16, 256, 32, 1, 4, 4, 2>;

enum class Tiles { small, medium, large };

// The shape with the least time: row tiles (whole ones, and half a tile more an expert for the last) times the time of
// a tile, in rows of Large. The speeds are shared-memory clocks an mma clock: Large 192 / 256, below 1, so bound by
// mma; Medium 144 / 128; Small 148 / 64.
constexpr Tiles choose_tiles(int64_t R, int64_t E) {
  const auto cost = [=](int64_t tile_rows, double slowness) {
    const double rows = static_cast<double>(R) / static_cast<double>(E), tiles = rows / static_cast<double>(tile_rows);
    return (tiles < 0.5 ? 1 : tiles + 0.5) * static_cast<double>(tile_rows) * slowness;
  };
  const double small = cost(Small::kM, 148. / 64), medium = cost(Medium::kM, 144. / 128), large = cost(Large::kM, 1);
  return small < medium && small < large ? Tiles::small : medium < large ? Tiles::medium : Tiles::large;
}

// Blocks of a persistent launch: as many as run at once, or as there are tiles.
constexpr int64_t grid_blocks(int64_t tiles, int sm_count, int blocks_per_sm) {
  const int64_t most = static_cast<int64_t>(sm_count) * blocks_per_sm;
  return tiles < most ? tiles : most;
}
}  // namespace sail::cuda::sm80

namespace sail::cuda::sm90 {
constexpr int kTileM = 128, kTileN = 256;

// Whether pairs of blocks that share B can gain anything: with less than two row tiles an expert on average there is
// little to share, and a pair walks in step. Where they do gain is for a card to say, so clusters are taken on demand.
constexpr bool choose_pairs(int64_t R, int64_t E) { return R >= 2 * kTileM * E; }
}  // namespace sail::cuda::sm90
