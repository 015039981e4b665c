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
  bool encode(const TensorBox& b, CUtensorMap* map) const {
    if (!b.encodable()) return false;
    map->data = static_cast<const char*>(b.data);
    for (int i = 0; i < 3; i++) map->size[i] = b.size[i], map->box[i] = b.box[i];
    for (int i = 0; i < 2; i++) map->stride[i] = b.stride[i];
    return true;
  }
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

// a: stride; b: expert stride, row stride, split, layout, zero_tail; sizes: R, E, N, K
RowsProblem rows(const void* a, const int32_t* index, const void* first, const void* second, const int32_t* offsets,
                 const int64_t* strides, const int64_t* sizes) {
  return {{a, strides[0], index},
          {first, second, strides[1], strides[2], strides[3]},
          static_cast<Layout>(strides[4]),
          offsets,
          sizes[0],
          sizes[1],
          sizes[2],
          sizes[3],
          strides[5] != 0};
}
}  // namespace

extern "C" {
const char* allow(const void* p, int64_t bytes) {
  emu::allow(p, static_cast<size_t>(bytes));
  return nullptr;
}
const char* forget_allowed() {
  emu::forget_allowed();
  return nullptr;
}

const char* store_rows(const int64_t* how, const void* a, const int32_t* index, const void* first, const void* second,
                       const int32_t* offsets, const int64_t* strides, const int64_t* sizes, void* out,
                       int64_t out_stride, const void* bias, const float* weight) {
  return run(how, rows(a, index, first, second, offsets, strides, sizes), StoreRows{out, out_stride, bias, weight});
}

const char* gated_forward(const int64_t* how, const void* a, const int32_t* index, const void* first,
                          const void* second, const int32_t* offsets, const int64_t* strides, const int64_t* sizes,
                          const void* bias, void* h, void* out, int64_t activation, double clamp) {
  return run(how, rows(a, index, first, second, offsets, strides, sizes),
             GatedForward{bias, h, out, static_cast<Activation>(activation), static_cast<float>(clamp)});
}

const char* gated_backward(const int64_t* how, const void* a, const int32_t* index, const void* first,
                           const void* second, const int32_t* offsets, const int64_t* strides, const int64_t* sizes,
                           const void* h, const float* weight, void* dh, void* a_weighted, float* dot,
                           int64_t activation, double clamp) {
  return run(
      how, rows(a, index, first, second, offsets, strides, sizes),
      GatedBackward{h, weight, dh, a_weighted, dot, static_cast<Activation>(activation), static_cast<float>(clamp)});
}

// strides: of a, of b; out: expert stride, row stride, split, fp32, accumulate; sizes: R, E, M, N
const char* wgrad(const int64_t* how, const void* a, const int32_t* index_a, const void* b, const int32_t* index_b,
                  const int32_t* offsets, const int64_t* strides, const int64_t* sizes, void* first, void* second,
                  const int64_t* out) {
  const WgradProblem p = {
      {a, strides[0], index_a}, {b, strides[1], index_b}, offsets, sizes[0], sizes[1], sizes[2], sizes[3]};
  return run(how, p, StoreGrad{{first, second, out[0], out[1], out[2]}, out[3] != 0, out[4] != 0});
}
}
