// Cross-entropy of rows of logits and its gradient in their place: a block a row, read twice and written once. A row of
// 151,936 words (304 KB in bf16) fits no block's memory, but those of all blocks at work fit the L2 cache of an A100 or
// H100: the second reading should not reach the device's memory.
#pragma once
#include <math.h>

#include "elements.cuh"

namespace sail::cuda {
constexpr int kLossThreads = 512;  // of a block; two blocks a multiprocessor, with 64 registers a thread
constexpr int kLossVectors = 2;    // loads of a thread in flight together: 32 KB a multiprocessor; 4 spilled

struct SoftmaxLoss {
  void* logits;        // [rows, V]; becomes the gradient where `gradient`
  const void* labels;  // [rows], label_stride apart
  int64_t label_stride;
  bool wide_labels;    // int64, otherwise int32
  const float* scale;  // [rows], of the gradient; null: ones
  float *logprobs, *lse;
  int64_t V, ignore_index;
  double z_loss;
  bool gradient;
};

// sum exp(v - max) of what was seen; of nothing with a finite max, so that a row of -inf sums to 0 and not to exp(nan).
struct RunningSum {
  float max, sum;
};
__device__ inline RunningSum merge(const RunningSum& a, const RunningSum& b) {
  const float max = fmaxf(a.max, b.max);
  return {max, a.sum * expf(a.max - max) + b.sum * expf(b.max - max)};
}

// Calls f(p, left, step) for up to kLossVectors of this thread's vectors at a time: p, p + step, ...; `left` are left.
template <class T, int N, class F> __device__ void for_row(T* row, int64_t V, F f) {
  const int64_t step = static_cast<int64_t>(blockDim.x) * N;
  for (int64_t c = threadIdx.x * N; c < V; c += step * kLossVectors) f(row + c, (V - c + step - 1) / step, step);
}

// log sum exp of a row in fp64, in thread 0: an error of it would be one of the token's whole gradient.
template <class T, int N> __device__ double log_sum_exp(const T* row, int64_t V) {
  __shared__ RunningSum part[kLossThreads / 32];
  RunningSum s = {-3.402823466e38f, 0.f};
  for_row<const T, N>(row, V, [&](const T* p, int64_t left, int64_t step) {
    Vec<T, N> u[kLossVectors];
    RunningSum next = s;
#pragma unroll
    for (int i = 0; i < kLossVectors; i++)
      if (i < left) u[i] = load_vector<N>(p + i * step);
    const auto for_each = [&](auto body) {
#pragma unroll
      for (int i = 0; i < kLossVectors; i++) {
        float v[N];
        widen(u[i], v);
#pragma unroll
        for (int j = 0; j < N; j++)
          if (i < left) body(v[j]);
      }
    };
    for_each([&](float v) { next.max = fmaxf(next.max, v); });
    next.sum *= expf(s.max - next.max);  // rescaled once for all of these
    for_each([&](float v) { next.sum += expf(v - next.max); });
    s = next;
  });
  for (int o = 16; o; o /= 2) {
    const RunningSum other = {__shfl_xor_sync(~0u, s.max, o), __shfl_xor_sync(~0u, s.sum, o)};
    s = merge(s, other);
  }
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x) return 0;
  float max = part[0].max;
  double sum = 0;
  for (int i = 1; i < kLossThreads / 32; i++) max = fmaxf(max, part[i].max);
  for (int i = 0; i < kLossThreads / 32; i++)
    sum += static_cast<double>(part[i].sum) * exp(static_cast<double>(part[i].max) - static_cast<double>(max));
  return static_cast<double>(max) + log(sum);
}

// With p = softmax(logits): logprob = log p[label], lse = log sum exp, and logits become
// scale ((1 + 2 z_loss lse) p - [v is the label]). An ignored row gives zeros; a label out of range gives NaN.
template <class T, int N> __global__ void __launch_bounds__(kLossThreads, 2) softmax_loss_kernel(SoftmaxLoss a) {
  __shared__ float shift, factor, target;
  const int64_t r = blockIdx.x, at = r * a.label_stride;
  const int64_t label =
      a.wide_labels ? static_cast<const int64_t*>(a.labels)[at] : static_cast<const int32_t*>(a.labels)[at];
  T* row = static_cast<T*>(a.logits) + r * a.V;
  const float scale = a.scale ? a.scale[r] : 1.f;
  if (label != a.ignore_index) {
    const bool inside = label >= 0 && label < a.V;
    const double lse = log_sum_exp<T, N>(row, a.V);
    if (threadIdx.x == 0) {
      target = inside ? static_cast<float>(row[label]) : NAN;
      a.lse[r] = static_cast<float>(lse), a.logprobs[r] = static_cast<float>(static_cast<double>(target) - lse);
      shift = static_cast<float>(lse);
      const double rest = exp(static_cast<double>(shift) - lse);  // what rounding the shift took
      factor = inside ? static_cast<float>(static_cast<double>(scale) * (1 + 2 * a.z_loss * lse) * rest) : NAN;
    }
  } else if (threadIdx.x == 0) {
    a.lse[r] = a.logprobs[r] = 0.f, shift = factor = 0.f;
  }
  if (!a.gradient) return;
  __syncthreads();
  const bool ignored = label == a.ignore_index;
  for_row<T, N>(row, a.V, [&](T* p, int64_t left, int64_t step) {
    Vec<T, N> u[kLossVectors];
#pragma unroll
    for (int i = 0; i < kLossVectors; i++)
      if (i < left && !ignored) u[i] = load_vector<N>(p + i * step);
#pragma unroll
    for (int i = 0; i < kLossVectors; i++) {
      if (i >= left) continue;
      float v[N];
      widen(u[i], v);
#pragma unroll
      for (int j = 0; j < N; j++) v[j] = ignored ? 0.f : expf(v[j] - shift) * factor;
      store(p + i * step, v);
    }
  });
  __syncthreads();
  if (threadIdx.x == 0 && !ignored && label >= 0 && label < a.V) {
    const double p = exp(static_cast<double>(target) - static_cast<double>(shift));
    row[label] = static_cast<T>(static_cast<float>(static_cast<double>(factor) * p - static_cast<double>(scale)));
  }
}
}  // namespace sail::cuda
