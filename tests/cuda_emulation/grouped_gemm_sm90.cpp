// The sm_90a grouped GEMM for tests/cuda/test_cuda_grouped_gemm_sm90.py: its own dispatch, launched on fibers.
#include "calls.h"
#include "cuda_runtime.h"
#include "dispatch_sm90.cuh"

namespace {
using namespace sail::cuda;

struct Start {
  const How& how;
  bool encode(const TensorBox& b, CUtensorMap* map) const { return ptx::encode(b, map); }
  int paired(const RowsProblem&) const { return how.paired; }
  template <class Arguments>
  void launch(void (*kernel)(Arguments), int64_t tiles, const Arguments& arguments, int paired = 0) const {
    emu::Options options;
    options.seed = static_cast<uint64_t>(how.seed), options.shared_bytes = sm90::kSharedBytes;
    options.cluster = 1u + static_cast<unsigned>(paired);
    const auto clusters = static_cast<unsigned>(ceil_div(std::min(tiles, how.blocks), options.cluster));
    emu::launch(clusters * options.cluster, sm90::kThreads, options, [&] { kernel(arguments); });
  }
};

template <class Problem, class Arguments> const char* run(const How& how, const Problem& p, const Arguments& out) {
  return emu::guard([&] {
#ifdef SAIL_FEW_KERNELS
    const bool started = sm90::dispatch<__nv_bfloat16>(p, out, Start{how});
#else
    const bool started = how.dtype == Element::bf16 ? sm90::dispatch<__nv_bfloat16>(p, out, Start{how})
                                                    : sm90::dispatch<__half>(p, out, Start{how});
#endif
    if (!started) throw std::runtime_error("not for TMA");
  });
}
}  // namespace

#include "grouped_gemm_calls.h"
