// The sm_80 attention kernels for tests/cuda/test_cuda_attention.py: their own dispatch, launched on fibers.
#include "cuda_runtime.h"

#include "attention_dispatch_sm80.cuh"

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

template <class Problem> const char* run(const int64_t* how, const Problem& a) {
  return emu::guard([&] {
    if (how[0] == 0) return sm80::dispatch<__nv_bfloat16>(a, Start{how[1]});
#ifndef SAIL_ONLY_BF16  // which compiles in half the time
    sm80::dispatch<__half>(a, Start{how[1]});
#endif
  });
}
}  // namespace

#include "attention_calls.h"

extern "C" {
// split: most queries of a sequence, splits, keys of each
const char* decode(const int64_t* how, const void* q, const void* k, const void* v, const int32_t* cu_q,
                   const int32_t* cu_k, const int64_t* sizes, const int64_t* strides, double scale, void* out,
                   float* lse, const int64_t* split, float* partial_out, float* partial_lse) {
  AttentionDecode a = {};
  set(a, q, k, v, cu_q, cu_k, sizes, strides, scale);
  a.out = out, a.lse = lse;
  a.most_queries = split[0], a.splits = split[1], a.chunk = split[2];
  a.partial_out = partial_out, a.partial_lse = partial_lse;
  return run(how, a);
}

const char* backward(const int64_t* how, const void* q, const void* k, const void* v, const int32_t* cu_q,
                     const int32_t* cu_k, const int64_t* sizes, const int64_t* strides, double scale, const void* dout,
                     const void* out, const float* lse, const float* dlse, float* stats, void* dq, void* dk, void* dv) {
  AttentionBackward a = {};
  set(a, q, k, v, cu_q, cu_k, sizes, strides, scale);
  a.dout = dout, a.out = out, a.lse = lse, a.dlse = dlse, a.stats = stats, a.dq = dq, a.dk = dk, a.dv = dv;
  return run(how, a);
}

int64_t splits(int64_t keys, int64_t blocks, int64_t sm_count, int64_t least) {
  return plan_splits(keys, blocks, static_cast<int>(sm_count), least).splits;
}
int64_t chunk(int64_t keys, int64_t blocks, int64_t sm_count, int64_t least) {
  return plan_splits(keys, blocks, static_cast<int>(sm_count), least).chunk;
}
}
