// RMSNorm forward and backward: one block a row, two passes; the second finds the row in L1 or L2.
//
// The weight gradient sums over rows without atomics: a block walks kRowsPerBlock rows and adds its own columns in
// shared memory (each thread only its own, so no barrier), writes one row of `partial`, and sum_rows_kernel adds those
// in a fixed order. Both orders depend on the shape alone, so every run gives the same bits.
#pragma once
#include "elements.cuh"

namespace sail::cuda {
constexpr int kRowsPerBlock = 32;  // partial sums then cost 1/16 of the traffic of x in bf16

struct RmsNormForward {
  const void *x, *residual, *weight;  // [rows, D] twice, [D]; residual: kAdd only
  void *y, *sum;                      // [rows, D], contiguous; sum = x + residual: kAdd only
  int64_t rows, D, x_stride, residual_stride;
  float eps;
};

struct RmsNormBackward {
  const void *grad, *grad_sum, *x, *weight;  // grad_sum [rows, D] is added to dx; null: none
  void* dx;                                  // [rows, D], contiguous; null: not needed
  float* partial;                            // [blocks, D]; null: dweight is not needed
  int64_t rows, D, grad_stride, grad_sum_stride, x_stride;
  bool shared_dweight;  // D floats of dynamic shared memory were given
  float eps;
};

// The sums of (a, b) over the block, in every thread.
__device__ inline float2 block_sum(float2 s) {
  __shared__ float2 part[32];
  for (int o = 16; o; o >>= 1) s.x += __shfl_xor_sync(~0u, s.x, o), s.y += __shfl_xor_sync(~0u, s.y, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
  __syncthreads();
  s = {0.f, 0.f};
  for (int i = 0; i < blockDim.x / 32; i++) s.x += part[i].x, s.y += part[i].y;
  __syncthreads();  // the next row's sums overwrite part
  return s;
}

// 1 / sqrt(v), with one step of Newton's method: the hardware's is two units off, and a whole row with it.
__device__ inline float inverse_root(float v) {
  const float r = rsqrtf(v);
  return v > 0.f && v < INFINITY ? fmaf(0.5f * r, fmaf(-v * r, r, 1.f), r) : r;
}

// y = v / sqrt(mean(v^2) + eps) * weight with v = x, or with kAdd v = sum = x + residual, rounded
template <class T, int N, bool kAdd> __global__ void rms_norm_kernel(RmsNormForward a) {
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t first = threadIdx.x * N, step = static_cast<int64_t>(blockDim.x) * N;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* y = static_cast<T*>(a.y) + row * a.D;
    T* sum = static_cast<T*>(a.sum) + row * a.D;
    float2 sums = {0.f, 0.f};
    for (int64_t c = first; c < a.D; c += step) {
      float v[N];
      load(x + c, v);
      if constexpr (kAdd) {
        float residual[N];
        load(static_cast<const T*>(a.residual) + row * a.residual_stride + c, residual);
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = static_cast<float>(static_cast<T>(v[i] + residual[i]));
        store(sum + c, v);
      }
#pragma unroll
      for (int i = 0; i < N; i++) sums.x = fmaf(v[i], v[i], sums.x);
    }
    const float r = inverse_root(block_sum(sums).x / static_cast<float>(a.D) + a.eps);
    for (int64_t c = first; c < a.D; c += step) {
      float v[N], w[N];
      load(kAdd ? sum + c : x + c, v);
      load(weight + c, w);
#pragma unroll
      for (int i = 0; i < N; i++) v[i] *= r * w[i];
      store(y + c, v);
    }
  }
}

// dx = r (w g - x r^2 mean(w g x)) + grad_sum, dweight = sum over rows of g x r, with r = 1 / sqrt(mean(x^2) + eps)
template <class T, int N> __global__ void rms_norm_backward_kernel(RmsNormBackward a) {
  float* shared = dynamic_shared<float>();
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t first = threadIdx.x * N, step = static_cast<int64_t>(blockDim.x) * N;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock;
  const int64_t end = a.rows < begin + kRowsPerBlock ? a.rows : begin + kRowsPerBlock;
  float* partial = a.partial + blockIdx.x * a.D;
  float* dweight = a.shared_dweight ? shared : partial;
  if (a.partial)
    for (int64_t c = first; c < a.D; c += step)
      for (int i = 0; i < N; i++) dweight[c + i] = 0.f;

  for (int64_t row = begin; row < end; row++) {
    const T* g_row = static_cast<const T*>(a.grad) + row * a.grad_stride;
    const T* x_row = static_cast<const T*>(a.x) + row * a.x_stride;
    float2 sums = {0.f, 0.f};
    for (int64_t c = first; c < a.D; c += step) {
      float g[N], x[N], w[N];
      load(g_row + c, g), load(x_row + c, x), load(weight + c, w);
#pragma unroll
      for (int i = 0; i < N; i++) sums.x = fmaf(x[i], x[i], sums.x), sums.y = fmaf(w[i] * g[i], x[i], sums.y);
    }
    sums = block_sum(sums);
    const float r = inverse_root(sums.x / static_cast<float>(a.D) + a.eps);
    const float mean = r * r * (sums.y / static_cast<float>(a.D));
    for (int64_t c = first; c < a.D; c += step) {
      float g[N], x[N];
      load(g_row + c, g), load(x_row + c, x);
      if (a.partial) {
#pragma unroll
        for (int i = 0; i < N; i++) dweight[c + i] = fmaf(g[i], x[i] * r, dweight[c + i]);
      }
      if (a.dx) {
        float w[N], extra[N] = {};
        load(weight + c, w);
        if (a.grad_sum) load(static_cast<const T*>(a.grad_sum) + row * a.grad_sum_stride + c, extra);
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = fmaf(fmaf(-x[i], mean, w[i] * g[i]), r, extra[i]);
        store(static_cast<T*>(a.dx) + row * a.D + c, x);
      }
    }
  }
  if (a.partial && a.shared_dweight)
    for (int64_t c = first; c < a.D; c += step)
      for (int i = 0; i < N; i++) partial[c + i] = dweight[c + i];
}

// out[c] = sum over rows of partial [rows, D]; a block is kSumColumns x kSumGroups threads.
constexpr int kSumColumns = 32, kSumGroups = 8;
template <class T> __global__ void sum_rows_kernel(const float* partial, int64_t rows, int64_t D, void* out) {
  __shared__ float group[kSumGroups][kSumColumns];
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  float s = 0.f;
  if (c < D)
    for (int64_t row = threadIdx.y; row < rows; row += kSumGroups) s += partial[row * D + c];
  group[threadIdx.y][threadIdx.x] = s;
  __syncthreads();
  if (threadIdx.y || c >= D) return;
  for (int i = 1; i < kSumGroups; i++) s += group[i][threadIdx.x];
  static_cast<T*>(out)[c] = static_cast<T>(s);
}
}  // namespace sail::cuda
