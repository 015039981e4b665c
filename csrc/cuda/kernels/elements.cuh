// Elements of bf16, fp16 and fp32 as floats: one, or N at a time in one access.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace sail::cuda {
enum class Scalar { f32 = 0, bf16 = 1, f16 = 2 };  // numbered as sail::DType

template <class T, int N> struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

template <int N, class T> __device__ Vec<T, N> load_vector(const T* p) {
  return *reinterpret_cast<const Vec<T, N>*>(p);
}
template <class T, int N> __device__ void store_vector(T* p, const Vec<T, N>& v) {
  *reinterpret_cast<Vec<T, N>*>(p) = v;
}
template <class T, int N> __device__ void widen(const Vec<T, N>& u, float (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) out[i] = static_cast<float>(u.v[i]);
}
template <class T, int N> __device__ Vec<T, N> narrow(const float (&in)[N]) {
  Vec<T, N> u;
#pragma unroll
  for (int i = 0; i < N; i++) u.v[i] = static_cast<T>(in[i]);
  return u;
}

template <class T, int N> __device__ void load(const T* p, float (&out)[N]) { widen(load_vector<N>(p), out); }
template <class T, int N> __device__ void store(T* p, const float (&in)[N]) { store_vector(p, narrow<T>(in)); }

// The block's dynamic shared memory; aligned as the widest swizzle wants it.
template <class T> __device__ T* dynamic_shared() {
#ifdef SAIL_EMULATE_CUDA
  return reinterpret_cast<T*>(emu::block().shared);
#else
  extern __shared__ __align__(1024) unsigned char dynamic_bytes[];
  return reinterpret_cast<T*>(dynamic_bytes);
#endif
}

// For tensors whose dtype is not that of the kernel's main operands.
__device__ inline float load_scalar(const void* p, Scalar type, int64_t at) {
  if (type == Scalar::f32) return static_cast<const float*>(p)[at];
  if (type == Scalar::bf16) return static_cast<float>(static_cast<const __nv_bfloat16*>(p)[at]);
  return static_cast<float>(static_cast<const __half*>(p)[at]);
}
}  // namespace sail::cuda
