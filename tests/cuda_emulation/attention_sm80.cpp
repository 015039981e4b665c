// The sm_80 attention kernels for tests/cuda/test_cuda_attention.py: their own dispatch, launched on fibers.
#include "cuda_runtime.h"

#include "attention_dispatch_sm80.cuh"
#include "calls.h"

namespace {
using namespace sail::cuda;

struct Start {
  int64_t seed;
  template <class Problem>
  void operator()(void (*kernel)(Problem), int64_t blocks, int threads, int shared_bytes, const Problem& p) const {
    emu::Options options;
    options.seed = static_cast<uint64_t>(seed), options.shared_bytes = static_cast<size_t>(shared_bytes);
    emu::launch(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), options, [&] { kernel(p); });
  }
};

template <class Problem> const char* run(const How& how, const Problem& a) {
  return emu::guard([&] {
    if (how.dtype == Element::bf16) return sm80::dispatch<__nv_bfloat16>(a, Start{how.seed});
#ifndef SAIL_ONLY_BF16  // which compiles in half the time
    sm80::dispatch<__half>(a, Start{how.seed});
#endif
  });
}
}  // namespace

#include "attention_calls.h"

const char* decode(const How& how, const AttentionDecode& a) { return run(how, a); }
const char* backward(const How& how, const AttentionBackward& a) { return run(how, a); }
