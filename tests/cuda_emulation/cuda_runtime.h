// The part of CUDA's language that kernels use, on the fibers of emulation.h: qualifiers, collectives, intrinsics, types.
// Stands in for cuda_runtime.h, cuda_bf16.h and cuda_fp16.h; no CUDA toolkit is needed.
#pragma once
#include <math.h>

#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ thread_local  // static within a function, and legal after extern; all fibers share one CPU thread
#define __forceinline__ inline
#define __noinline__
#define __restrict__
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

using std::max;
using std::min;

// ---- vectors
struct float2 {
  float x, y;
};
struct int2 {
  int x, y;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

// ---- bf16 and fp16: storage, rounded to nearest even
template <class T, class From> T bits_as(From from) {
  static_assert(sizeof(T) == sizeof(From));
  T to;
  memcpy(&to, &from, sizeof to);
  return to;
}
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float f) {
    const uint32_t u = bits_as<uint32_t>(f);
    bits = f != f ? 0x7fff : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  operator float() const { return bits_as<float>(static_cast<uint32_t>(bits) << 16); }
};
struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float f) : bits(f != f ? 0x7fff : bits_as<uint16_t>(static_cast<_Float16>(f))) {}
  operator float() const { return static_cast<float>(bits_as<_Float16>(bits)); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
using half = __half;
using half2 = __half2;
inline __nv_bfloat16 __float2bfloat16(float f) { return __nv_bfloat16(f); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return __nv_bfloat16(f); }
inline __half __float2half(float f) { return __half(f); }
inline __half __float2half_rn(float f) { return __half(f); }
inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline float __half2float(__half v) { return v; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }

// ---- arithmetic. __fadd_rn and its kind are never contracted: volatile keeps the compiler from it.
inline float __fadd_rn(float a, float b) {
  volatile float r = a + b;
  return r;
}
inline float __fsub_rn(float a, float b) {
  volatile float r = a - b;
  return r;
}
inline float __fmul_rn(float a, float b) {
  volatile float r = a * b;
  return r;
}
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __expf(float a) { return expf(a); }
inline float __logf(float a) { return logf(a); }
inline float rsqrtf(float a) { return 1.f / sqrtf(a); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __float_as_int(float v) { return bits_as<int>(v); }
inline unsigned __float_as_uint(float v) { return bits_as<unsigned>(v); }
inline float __int_as_float(int v) { return bits_as<float>(v); }
inline float __uint_as_float(unsigned v) { return bits_as<float>(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T atomicAdd(T* p, T v) {
  const T old = *p;
  *p = old + v;
  return old;
}
template <class T> T atomicMax(T* p, T v) {
  const T old = *p;
  *p = std::max(old, v);
  return old;
}

// ---- collectives
inline void __syncthreads() { emu::sync_threads(); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __syncwarp(unsigned mask = ~0u) {
  emu::warp_collective<char>("__syncwarp", mask, char{}, [](emu::Fiber**) {});
}
namespace emu {
template <class T> struct Shuffle {
  T value;
  int from;
};
// from: the lane to read within the segment of `width`, or the own lane where that lies outside
template <class T> T shuffle(const char* name, unsigned mask, T value, int from) {
  return warp_collective<T>(name, mask, Shuffle<T>{value, from}, [](Fiber** lanes) {
    for (int i = 0; i < kWarp; i++) {
      if (!lanes[i]) continue;
      Fiber* source = lanes[argument_of<Shuffle<T>>(lanes[i]).from];
      if (!source) fail("a shuffle reads a lane outside of its mask");
      result_of<T>(lanes[i]) = argument_of<Shuffle<T>>(source).value;
    }
  });
}
}  // namespace emu
template <class T> T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const int mine = emu::self().lane;
  return emu::shuffle("__shfl_sync", mask, value, mine / width * width + (lane & (width - 1)));
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int mine = emu::self().lane, from = mine ^ bits;
  return emu::shuffle("__shfl_xor_sync", mask, value, from / width > mine / width ? mine : from);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int mine = emu::self().lane, from = mine - static_cast<int>(by);
  return emu::shuffle("__shfl_up_sync", mask, value, from < mine / width * width ? mine : from);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int mine = emu::self().lane, from = mine + static_cast<int>(by);
  return emu::shuffle("__shfl_down_sync", mask, value, from >= (mine / width + 1) * width ? mine : from);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emu::warp_collective<unsigned>("__ballot_sync", mask, predicate, [](emu::Fiber** lanes) {
    unsigned bits = 0;
    for (int i = 0; i < emu::kWarp; i++)
      if (lanes[i] && emu::argument_of<int>(lanes[i])) bits |= 1u << i;
    for (int i = 0; i < emu::kWarp; i++)
      if (lanes[i]) emu::result_of<unsigned>(lanes[i]) = bits;
  });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
template <class T> unsigned __match_any_sync(unsigned mask, T value) {
  return emu::warp_collective<unsigned>("__match_any_sync", mask, value, [](emu::Fiber** lanes) {
    for (int i = 0; i < emu::kWarp; i++) {
      if (!lanes[i]) continue;
      unsigned bits = 0;
      for (int j = 0; j < emu::kWarp; j++)
        if (lanes[j] && emu::argument_of<T>(lanes[j]) == emu::argument_of<T>(lanes[i])) bits |= 1u << j;
      emu::result_of<unsigned>(lanes[i]) = bits;
    }
  });
}
template <class T> T __reduce_add_sync(unsigned mask, T value) {
  return emu::warp_collective<T>("__reduce_add_sync", mask, value, [](emu::Fiber** lanes) {
    T sum = 0;
    for (int i = 0; i < emu::kWarp; i++)
      if (lanes[i]) sum += emu::argument_of<T>(lanes[i]);
    for (int i = 0; i < emu::kWarp; i++)
      if (lanes[i]) emu::result_of<T>(lanes[i]) = sum;
  });
}
