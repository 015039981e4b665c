// The sm_90a attention forward for tests/cuda/test_cuda_attention_sm90.py: its own dispatch, launched on fibers.
#include "cuda_runtime.h"

#include "attention_dispatch_sm90.cuh"
#include "calls.h"

namespace {
using namespace sail::cuda;

struct Start {
  int64_t seed;
  bool encode(const TensorBox& b, CUtensorMap* map) const { return ptx::encode(b, map); }
  template <class Arguments>
  void launch(void (*kernel)(Arguments), int64_t blocks, int threads, int shared_bytes, const Arguments& a) const {
    emu::Options options;
    options.seed = static_cast<uint64_t>(seed), options.shared_bytes = static_cast<size_t>(shared_bytes);
    emu::launch(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), options, [&] { kernel(a); });
  }
};

const char* run(const How& how, const AttentionForward& a) {
  return emu::guard([&] {
#ifdef SAIL_ONLY_BF16  // which compiles in half the time
    const bool started = sm90::dispatch<__nv_bfloat16>(a, Start{how.seed});
#else
    const Start start{how.seed};
    const bool started =
        how.dtype == Element::bf16 ? sm90::dispatch<__nv_bfloat16>(a, start) : sm90::dispatch<__half>(a, start);
#endif
    if (!started) throw std::runtime_error("not for TMA");
  });
}
}  // namespace

#include "attention_calls.h"
