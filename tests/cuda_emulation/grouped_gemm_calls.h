// What a test calls of a grouped GEMM, by flat arguments. Included where `run(how, problem, epilogue)` is defined.
#pragma once
#include "allow_calls.h"

namespace {
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
}  // extern "C"
