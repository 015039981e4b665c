// What a test calls of an attention forward, by flat arguments. Included where `run(how, problem)` is defined.
#pragma once
#include "allow_calls.h"

namespace {
// how: fp16, seed; sizes: B, S, L, H, G, D, causal; strides: batch, token, head of q, of k, of v
template <class Problem>
void set(Problem& a, const void* q, const void* k, const void* v, const int32_t* cu_q, const int32_t* cu_k,
         const int64_t* sizes, const int64_t* strides, double scale) {
  a.q = {q, strides[0], strides[1], strides[2]};
  a.k = {k, strides[3], strides[4], strides[5]};
  a.v = {v, strides[6], strides[7], strides[8]};
  a.cu_q = cu_q, a.cu_k = cu_k;
  a.B = sizes[0], a.S = sizes[1], a.L = sizes[2], a.H = sizes[3], a.G = sizes[4], a.D = sizes[5];
  a.causal = sizes[6] != 0, a.scale = static_cast<float>(scale);
}
}  // namespace

extern "C" {
const char* forward(const int64_t* how, const void* q, const void* k, const void* v, const int32_t* cu_q,
                    const int32_t* cu_k, const int64_t* sizes, const int64_t* strides, double scale, void* out,
                    float* lse) {
  AttentionForward a = {};
  set(a, q, k, v, cu_q, cu_k, sizes, strides, scale);
  a.out = out, a.lse = lse;
  return run(how, a);
}
}
