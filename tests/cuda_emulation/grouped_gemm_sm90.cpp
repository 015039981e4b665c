// The sm_90a grouped GEMM for tests/cuda/test_cuda_grouped_gemm_sm90.py: its own dispatch, launched on fibers.
#include "cuda_runtime.h"
#include "dispatch_sm90.cuh"

namespace {
using namespace sail::cuda;

struct How {
  int64_t dtype, tiles, seed, blocks, paired;  // tiles: unused, there is one shape
};
struct Start {
  const How& how;
  bool encode(const TensorBox& b, CUtensorMap* map) const { return ptx::encode(b, map); }
  int paired(const RowsProblem&) const { return static_cast<int>(how.paired); }
  template <class Arguments>
  void launch(void (*kernel)(Arguments), int64_t tiles, const Arguments& arguments, int paired = 0) const {
    emu::Options options;
    options.seed = static_cast<uint64_t>(how.seed), options.shared_bytes = sm90::kSharedBytes;
    options.cluster = 1u + static_cast<unsigned>(paired);
    const auto clusters = static_cast<unsigned>(ceil_div(std::min(tiles, how.blocks), options.cluster));
    emu::launch(clusters * options.cluster, sm90::kThreads, options, [&] { kernel(arguments); });
  }
};

template <class Problem, class Arguments> const char* run(const int64_t* how, const Problem& p, const Arguments& out) {
  const How h = {how[0], how[1], how[2], how[3], how[4]};
  return emu::guard([&] {
#ifdef SAIL_FEW_KERNELS
    const bool started = sm90::dispatch<__nv_bfloat16>(p, out, Start{h});
#else
    const bool started =
        h.dtype == 0 ? sm90::dispatch<__nv_bfloat16>(p, out, Start{h}) : sm90::dispatch<__half>(p, out, Start{h});
#endif
    if (!started) throw std::runtime_error("not for TMA");
  });
}
}  // namespace

#include "grouped_gemm_calls.h"

extern "C" int64_t choose_pairs(int64_t R, int64_t E) { return sm90::choose_pairs(R, E); }
