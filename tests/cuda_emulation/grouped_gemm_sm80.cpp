// The sm_80 grouped GEMM for tests/cuda/test_cuda_grouped_gemm.py: its own dispatch, launched on fibers. With SAIL_FEW_KERNELS
// only aligned bf16 in the largest tile shape, for tests that compile often.
#include "calls.h"
#include "cuda_runtime.h"
#include "dispatch_sm80.cuh"

namespace {
using namespace sail::cuda;

struct Start {
  const How& how;
  sm80::Tiles tiles(const RowsProblem&) const { return how.tiles; }
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

template <class Problem, class Arguments> const char* run(const How& how, const Problem& p, const Arguments& out) {
  return emu::guard([&] {
#ifdef SAIL_FEW_KERNELS
    few(p, out, Start{how});
#else
    if (how.dtype == Element::bf16) return sm80::dispatch<__nv_bfloat16>(p, out, Start{how});
    sm80::dispatch<__half>(p, out, Start{how});
#endif
  });
}
}  // namespace

#include "grouped_gemm_calls.h"

const char* row_tiles(const RowsProblem& p, const How& how, int64_t tile_rows, int64_t n_tiles, int64_t most,
                      int64_t* found, int64_t* count) {
  return emu::guard([&] {
    *count = 0;
    emu::launch(static_cast<unsigned>(how.blocks), 32, {}, [&] {
      RowTiles tiles(p, static_cast<int>(tile_rows), n_tiles, how.paired);
      RowTile t;
      const int64_t first = blockIdx.x >> how.paired, step = gridDim.x >> how.paired;
      int64_t number = first;
      for (int64_t i = first; tiles.find(i, &t, blockIdx.x & how.paired); i += step, number += step) {
        if (threadIdx.x || *count >= most) continue;
        const int64_t entry[] = {number, t.expert, t.row, t.row_end, t.n, t.shares_b};
        memcpy(found + 6 * (*count)++, entry, sizeof entry);
      }
    });
  });
}

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