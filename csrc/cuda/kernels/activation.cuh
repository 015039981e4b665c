// SwiGLU and its gradient, element-wise, in fp32: a block takes one piece of one row.
#pragma once
#include "elements.cuh"

namespace sail::cuda {
constexpr int kActivationThreads = 256, kActivationSteps = 4;  // vectors a thread; loads of 4 are in flight together

struct SwiGLU {
  const void *gate, *up, *grad;  // rows `stride` elements apart; grad: backward only
  void *out, *dgate, *dup;       // contiguous; out: forward only, the others: backward only
  int64_t width, per_row;        // elements of a row, blocks of a row
  int64_t gate_stride, up_stride, grad_stride;
};

__device__ inline float logistic(float x) { return 1.f / (1.f + expf(-x)); }

// Calls f(row, column) for this thread's vectors.
template <int N, class F> __device__ void for_vectors(const SwiGLU& a, F f) {
  const int64_t row = blockIdx.x / a.per_row, piece = blockIdx.x % a.per_row;
  const int64_t first = piece * kActivationSteps * kActivationThreads;
#pragma unroll
  for (int i = 0; i < kActivationSteps; i++) {
    const int64_t column = (first + i * kActivationThreads + threadIdx.x) * N;
    if (column < a.width) f(row, column);
  }
}

template <class T, int N> __global__ void swiglu_kernel(SwiGLU a) {
  for_vectors<N>(a, [&](int64_t row, int64_t c) {
    float g[N], u[N];
    load(static_cast<const T*>(a.gate) + row * a.gate_stride + c, g);
    load(static_cast<const T*>(a.up) + row * a.up_stride + c, u);
#pragma unroll
    for (int j = 0; j < N; j++) g[j] = g[j] * logistic(g[j]) * u[j];
    store(static_cast<T*>(a.out) + row * a.width + c, g);
  });
}

// with s = sigmoid(gate): dgate = grad up s (1 + gate (1 - s)), dup = grad gate s
template <class T, int N> __global__ void swiglu_backward_kernel(SwiGLU a) {
  for_vectors<N>(a, [&](int64_t row, int64_t c) {
    float g[N], u[N], d[N];
    load(static_cast<const T*>(a.gate) + row * a.gate_stride + c, g);
    load(static_cast<const T*>(a.up) + row * a.up_stride + c, u);
    load(static_cast<const T*>(a.grad) + row * a.grad_stride + c, d);
#pragma unroll
    for (int j = 0; j < N; j++) {
      const float s = logistic(g[j]);
      u[j] = d[j] * u[j] * s * (1.f + g[j] * (1.f - s));
      d[j] = d[j] * g[j] * s;
    }
    store(static_cast<T*>(a.dgate) + row * a.width + c, u);
    store(static_cast<T*>(a.dup) + row * a.width + c, d);
  });
}
}  // namespace sail::cuda
