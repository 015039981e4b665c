// Which tile of a grouped GEMM a block computes next. Blocks are persistent: block b takes tiles b, b + blocks, ... of
// one list that follows from the offsets in device memory alone, so nothing is read back and no counter is shared.
// The tiles of an expert are neighbors in the list; within it, tile_at orders them for the second-level cache.
#pragma once
#include "grouped_gemm.h"

namespace sail::cuda {
SAIL_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of tiles whose columns are walked together: 16 x 13 tiles are under way at once on 216 blocks (an A100), which
// read 29 tiles' worth of operands from memory; 1 x 216 would read 217.
constexpr int64_t kTileGroup = 16;

struct TileAt {
  int64_t m, n;
};
// Tile `index` of m_tiles x n_tiles: groups of kTileGroup rows of tiles, in a group column by column.
SAIL_HD constexpr TileAt tile_at(int64_t index, int64_t m_tiles, int64_t n_tiles) {
  const int64_t group = index / (kTileGroup * n_tiles), first = group * kTileGroup;
  const int64_t rows = m_tiles - first < kTileGroup ? m_tiles - first : kTileGroup;
  const auto within = static_cast<uint32_t>(index - first * n_tiles), rows32 = static_cast<uint32_t>(rows);
  return {first + within % rows32, within / rows32};
}

// The most tiles that R rows of E experts can make, however they are split.
SAIL_HD constexpr int64_t most_row_tiles(int64_t R, int64_t E, int64_t tile_rows, int64_t n_tiles) {
  return (R / tile_rows + (R < E ? R : E) + 1) * n_tiles;  // 1: the tail
}

// The same for a pair of blocks of one cluster, which compute tile `index` of theirs at once: two rows of tiles in one
// column, which share B, and where one row is left over two columns of it. Nobody idles but at an odd last column.
struct PairAt {
  TileAt at;  // of the block of this rank; n == n_tiles: it has none
  bool shares_b;
};
SAIL_HD constexpr int64_t pair_tiles(int64_t m_tiles, int64_t odd, int64_t n_tiles) {
  return (m_tiles - odd) / 2 * n_tiles + odd * ((n_tiles + 1) / 2);
}
SAIL_HD constexpr PairAt pair_at(int64_t index, int64_t m_tiles, int64_t n_tiles, int rank) {
  const int64_t shared = m_tiles / 2 * n_tiles;
  if (index >= shared) return {{m_tiles - 1, (index - shared) * 2 + rank}, false};
  const TileAt two = tile_at(index, m_tiles / 2, n_tiles);
  return {{two.m * 2 + rank, two.n}, true};
}

// ---- tiles of a WgradProblem: the same number for every expert
struct WgradTile {
  int64_t expert, m, n;
};
SAIL_HD constexpr WgradTile wgrad_tile(int64_t tile, int64_t m_tiles, int64_t n_tiles) {
  const int64_t expert = tile / (m_tiles * n_tiles);
  const TileAt at = tile_at(tile - expert * m_tiles * n_tiles, m_tiles, n_tiles);
  return {expert, at.m, at.n};
}

// ---- tiles of a RowsProblem
struct RowTile {
  int32_t expert;           // E: the tail
  int32_t row, row_end, n;  // rows row .. min(row + tile rows, row_end), tile column n
  bool shares_b;            // the other block of the pair has this column and expert too
};

#if defined(__CUDACC__) || defined(SAIL_EMULATE_CUDA)
// Finds tiles of rising numbers; every lane of a warp calls it alike. A lane holds one of 32 experts at a time, so that
// E experts cost E / 32 steps in the whole life of a block. paired: the tiles of a pair of blocks, for one of them.
class RowTiles {
 public:
  __device__ RowTiles(const RowsProblem& p, int tile_rows, int64_t n_tiles, bool paired = false)
      : p_(p), tile_rows_(tile_rows), n_tiles_(static_cast<int32_t>(n_tiles)), paired_(paired) {
    read_experts();
  }

  // False: there is no such tile. `tile` counts from the first of the 32 experts: it falls by what was passed over.
  // rank: of the block in its pair.
  __device__ bool find(int64_t& tile, RowTile* out, int rank = 0) {
    for (int64_t here; tile >= (here = tiles_of(__shfl_sync(~0u, ends_, 31), 32));) {
      first_ += 32;
      if (first_ >= experts()) return false;
      tile -= here;
      read_experts();
    }
    const int owner = __ffs(__ballot_sync(~0u, tile < tiles_of(ends_, threadIdx.x % 32 + 1))) - 1;
    const int end = __shfl_sync(~0u, ends_, owner), begin = owner ? __shfl_sync(~0u, ends_, owner - 1) : 0;
    const int64_t index = tile - tiles_of(begin, owner);
    const PairAt pair =
        paired_ ? pair_at(index, end - begin, n_tiles_, rank) : PairAt{tile_at(index, end - begin, n_tiles_), false};
    const TileAt at = pair.at;
    out->shares_b = pair.shares_b;
    out->expert = first_ + owner;
    out->row = p_.offsets[out->expert] + static_cast<int32_t>(at.m) * tile_rows_;
    out->row_end = row_end(out->expert);
    out->n = static_cast<int32_t>(at.n);
    return true;
  }

 private:
  __device__ int32_t experts() const { return static_cast<int32_t>(p_.E) + p_.zero_tail; }  // the tail is one
  __device__ int32_t row_end(int32_t e) const { return e < p_.E ? p_.offsets[e + 1] : static_cast<int32_t>(p_.R); }

  // The running sum of row tiles over the lanes; this lane's expert is first_ + lane.
  __device__ void read_experts() {
    const int lane = threadIdx.x % 32;
    const int32_t e = first_ + lane, rows = e < experts() ? row_end(e) - p_.offsets[e] : 0;
    ends_ = rows / tile_rows_ + (rows % tile_rows_ != 0);
    if (paired_) odd_ = __ballot_sync(~0u, ends_ % 2);
    for (int o = 1; o < 32; o *= 2) {
      const int32_t lower = __shfl_up_sync(~0u, ends_, o);
      if (lane >= o) ends_ += lower;
    }
  }

  // Of the first `experts` of the 32, which have so many row tiles.
  __device__ int64_t tiles_of(int32_t row_tiles, int experts) const {
    if (!paired_) return static_cast<int64_t>(row_tiles) * n_tiles_;
    return pair_tiles(row_tiles, __popc(experts == 32 ? odd_ : odd_ & ((1u << experts) - 1)), n_tiles_);
  }

  const RowsProblem& p_;  // a kernel's parameter, which costs no register
  int32_t tile_rows_, n_tiles_;
  bool paired_;
  uint32_t odd_ = 0;   // of a pair: the experts with an odd number of row tiles
  int32_t first_ = 0;  // expert of lane 0
  int32_t ends_;
};
#endif
}  // namespace sail::cuda
