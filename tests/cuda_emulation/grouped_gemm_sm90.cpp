// The sm_90a grouped GEMM for tests/test_cuda_grouped_gemm_sm90.py: its own dispatch, launched on fibers.
#include "cuda_runtime.h"
#include "dispatch_sm90.cuh"

namespace {
using namespace sail::cuda;

struct How {
  int64_t dtype, tiles, seed, blocks;  // tiles: unused, there is one shape
};
struct Start {
  const How& how;
  bool encode(const TensorBox& b, CUtensorMap* map) const { return ptx::encode(b, map); }
  template <class Arguments>
  void launch(void (*kernel)(Arguments), int64_t tiles, const Arguments& arguments) const {
    emu::Options options;
    options.seed = static_cast<uint64_t>(how.seed), options.shared_bytes = sm90::kSharedBytes;
    const auto blocks = static_cast<unsigned>(std::min(tiles, how.blocks));
    emu::launch(blocks, sm90::kThreads, options, [&] { kernel(arguments); });
  }
};

template <class Problem, class Arguments> const char* run(const int64_t* how, const Problem& p, const Arguments& out) {
  const How h = {how[0], how[1], how[2], how[3]};
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
