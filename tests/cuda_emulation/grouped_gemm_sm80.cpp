// The sm_80 grouped GEMM for tests/cuda/test_cuda_grouped_gemm.py: its own dispatch, launched on fibers. With SAIL_FEW_KERNELS
// only aligned bf16 in the largest tile shape, for tests that compile often.
#include "cuda_runtime.h"
#include "dispatch_sm80.cuh"

namespace {
using namespace sail::cuda;

struct How {
  int64_t dtype, tiles, seed, blocks;  // tiles: of sm80::Tiles
};
struct Start {
  const How& how;
  sm80::Tiles tiles(const RowsProblem&) const { return static_cast<sm80::Tiles>(how.tiles); }
  template <class Shape, class Problem, class Arguments>
  void launch(void (*kernel)(Problem, Arguments), int64_t tiles, const Problem& p, const Arguments& arguments) const {
    emu::Options options;
    options.seed = static_cast<uint64_t>(how.seed), options.shared_bytes = Shape::kSharedBytes;
    const auto blocks = static_cast<unsigned>(std::min(tiles, how.blocks));
    emu::launch(blocks, Shape::kThreads, options, [&] { kernel(p, arguments); });
  }
};

#ifdef SAIL_FEW_KERNELS
using T = __nv_bfloat16;
void few(const RowsProblem& p, const StoreRows& out, const Start& start) {
  using Epilogue = StoreRowsEpilogue<T, true>;
  if (p.layout == Layout::nk) return sm80::start_rows<T, sm80::Large, Layout::nk, true, Epilogue>(p, out, start);
  sm80::start_rows<T, sm80::Large, Layout::kn, true, Epilogue>(p, out, start);
}
void few(const RowsProblem& p, const GatedForward& out, const Start& start) {
  sm80::start_rows<T, sm80::Large, Layout::nk, true, GatedForwardEpilogue<T, Silu, true>>(p, out, start);
}
void few(const RowsProblem& p, const GatedBackward& out, const Start& start) {
  sm80::start_rows<T, sm80::Large, Layout::kn, true, GatedBackwardEpilogue<T, Silu, true>>(p, out, start);
}
void few(const WgradProblem& p, const StoreGrad& out, const Start& start) {
  const int64_t tiles = p.E * ceil_div(p.M, sm80::Large::kM) * ceil_div(p.N, sm80::Large::kN);
  start.launch<sm80::Large>(sm80::wgrad_kernel<T, sm80::Large, true>, tiles, p, out);
}
#endif

template <class Problem, class Arguments> const char* run(const int64_t* how, const Problem& p, const Arguments& out) {
  const How h = {how[0], how[1], how[2], how[3]};
  return emu::guard([&] {
#ifdef SAIL_FEW_KERNELS
    few(p, out, Start{h});
#else
    if (h.dtype == 0) return sm80::dispatch<__nv_bfloat16>(p, out, Start{h});
    sm80::dispatch<__half>(p, out, Start{h});
#endif
  });
}
}  // namespace

#include "grouped_gemm_calls.h"

extern "C" {
// ---- the tile scheduler: for every tile that a block takes, (number, expert, row, row_end, n, shares_b) into `found`;
// of pairs, with the number of a pair's tile for both
const char* row_tiles(int64_t blocks, int64_t paired, int64_t tile_rows, int64_t n_tiles, const int32_t* offsets,
                      int64_t R, int64_t E, int64_t zero_tail, int64_t most, int64_t* found, int64_t* count) {
  return emu::guard([&] {
    RowsProblem p = {};
    p.offsets = offsets, p.R = R, p.E = E, p.zero_tail = zero_tail != 0;
    *count = 0;
    emu::launch(static_cast<unsigned>(blocks), 32, {}, [&] {
      RowTiles tiles(p, static_cast<int>(tile_rows), n_tiles, paired != 0);
      RowTile t;
      const int64_t first = blockIdx.x >> paired, step = gridDim.x >> paired;
      int64_t number = first;
      for (int64_t i = first; tiles.find(i, &t, blockIdx.x & paired); i += step, number += step) {
        if (threadIdx.x || *count >= most) continue;
        const int64_t entry[] = {number, t.expert, t.row, t.row_end, t.n, t.shares_b};
        memcpy(found + 6 * (*count)++, entry, sizeof entry);
      }
    });
  });
}
int64_t most_row_tiles(int64_t R, int64_t E, int64_t tile_rows, int64_t n_tiles) {
  return sail::cuda::most_row_tiles(R, E, tile_rows, n_tiles);
}
// (m, n) of every tile of a WgradProblem into `found`: [experts * m_tiles * n_tiles, 3]
const char* wgrad_tiles(int64_t experts, int64_t m_tiles, int64_t n_tiles, int64_t* found) {
  for (int64_t i = 0; i < experts * m_tiles * n_tiles; i++) {
    const WgradTile t = wgrad_tile(i, m_tiles, n_tiles);
    found[3 * i] = t.expert, found[3 * i + 1] = t.m, found[3 * i + 2] = t.n;
  }
  return nullptr;
}
int64_t choose_tiles(int64_t R, int64_t E) { return static_cast<int64_t>(sm80::choose_tiles(R, E)); }

// Chunks that meet in a bank group of 16 bytes when ldmatrix reads eight rows, or eight threads write a row; the most.
int64_t bank_conflicts() {
  int64_t worst = 0;
  const auto count = [&](auto tile) {
    using Tile = decltype(tile);
    for (int first = 0; first < Tile::kRows; first += 8)
      for (int chunk = 0; chunk < Tile::kChunks; chunk++) {
        int uses[8] = {};
        for (int row = first; row < first + 8; row++) uses[Tile::offset(row, chunk) / 16 % 8]++;
        for (int u : uses) worst = std::max<int64_t>(worst, u);
      }
    for (int i = 0; i < Tile::kRows * Tile::kChunks; i += 8) {
      int uses[8] = {};
      for (int t = i; t < i + 8; t++) uses[Tile::offset(t / Tile::kChunks, t % Tile::kChunks) / 16 % 8]++;
      for (int u : uses) worst = std::max<int64_t>(worst, u);
    }
  };
  count(sm80::OperandTile<128, 32, false>{}), count(sm80::OperandTile<128, 32, true>{});
  count(sm80::OperandTile<256, 32, false>{}), count(sm80::OperandTile<256, 32, true>{});
  count(sm80::OperandTile<64, 32, false>{}), count(sm80::OperandTile<64, 32, true>{});
  count(sm80::OperandTile<16, 32, false>{});
  return worst;
}
}
