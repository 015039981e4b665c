// What becomes of the products, two adjacent columns of a row at a time: that is how the fragments of mma.sync and of
// wgmma hold them. A mainloop makes an epilogue, calls row(e, r) once for each of its rows, and of what it gets
//   pair(n, x, y)         for columns n and n + 1, n even (StoreRows, GatedBackward, StoreGrad)
//   pair(f, gate, up)     for columns f and f + 1 of both halves (GatedForward)
//   finish(n)             GatedBackward only: after the kDotColumns columns from n, by all lanes of the warp
// Columns past the last are not stored. The arguments are those of grouped_gemm.h; T is their element.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "grouped_gemm.h"

namespace sail::cuda {
// ---- two elements
template <class T> struct alignas(2 * sizeof(T)) Pair {
  T x, y;
};
__device__ __forceinline__ Pair<float> make_pair(float x, float y, const float*) { return {x, y}; }
template <class T> __device__ __forceinline__ Pair<T> make_pair(float x, float y, const T*) {
  return {static_cast<T>(x), static_cast<T>(y)};
}

// Pairs in one access need an even number of columns, and rows that start on a pair.
template <class T> SAIL_HD bool whole_pairs(const void* p, int64_t columns, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % (2 * sizeof(T)) == 0 && columns % 2 == 0 && stride % 2 == 0;
}

// Columns n and n + 1 of a row of N columns
template <class T> __device__ __forceinline__ void store_pair(T* row, int64_t n, int64_t N, bool whole, float2 v) {
  if (whole) {
    if (n < N) *reinterpret_cast<Pair<T>*>(row + n) = make_pair(v.x, v.y, row);
    return;
  }
  if (n < N) row[n] = static_cast<T>(v.x);
  if (n + 1 < N) row[n + 1] = static_cast<T>(v.y);
}
template <class T> __device__ __forceinline__ float2 load_pair(const T* row, int64_t n, int64_t N, bool whole) {
  if (whole) {
    if (n >= N) return {0.f, 0.f};
    const Pair<T> v = *reinterpret_cast<const Pair<T>*>(row + n);
    return {static_cast<float>(v.x), static_cast<float>(v.y)};
  }
  return {n < N ? static_cast<float>(row[n]) : 0.f, n + 1 < N ? static_cast<float>(row[n + 1]) : 0.f};
}

// ---- activations: the value, and with it the derivative
struct Slope {
  float value, slope;
};
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
struct Silu {
  static __device__ __forceinline__ float value(float x) { return x * sigmoid(x); }
  static __device__ __forceinline__ Slope both(float x) {
    const float s = sigmoid(x);
    return {x * s, s * (1.f + x * (1.f - s))};
  }
};
struct Gelu {
  static __device__ __forceinline__ float cdf(float x) {
    return 0.5f * erfcf(x * -0.70710678f);
  }  // keeps the left tail
  static __device__ __forceinline__ float value(float x) { return x * cdf(x); }
  static __device__ __forceinline__ Slope both(float x) {
    const float c = cdf(x);
    return {x * c, c + x * 0.39894228f * __expf(x * x * -0.5f)};
  }
};
struct GeluTanh {
  // 0.5 * (1 + tanh(u)) = sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
  static __device__ __forceinline__ float gate(float x) { return sigmoid(x * (1.5957691f + 0.071354814f * x * x)); }
  static __device__ __forceinline__ float value(float x) { return x * gate(x); }
  static __device__ __forceinline__ Slope both(float x) {
    const float s = gate(x);
    return {x * s, s + x * s * (1.f - s) * (1.5957691f + 0.21406444f * x * x)};
  }
};

__device__ __forceinline__ float clamp_gate(float g, float limit) { return g > limit ? limit : g; }  // keeps NaN
__device__ __forceinline__ float clamp_up(float u, float limit) { return u > limit ? limit : u < -limit ? -limit : u; }

// ---- out[r, n] = (C[r, n] + bias[e, n]) * weight[r]
template <class T> struct StoreRowsEpilogue {
  using Arguments = StoreRows;
  StoreRows a;
  int64_t N, E;
  bool whole;
  __device__ StoreRowsEpilogue(const RowsProblem& p, const StoreRows& arguments)
      : a(arguments), N(p.N), E(p.E), whole(whole_pairs<T>(a.out, N, a.out_stride)) {}

  struct Row {
    const StoreRowsEpilogue& o;
    T* out;
    const T* bias;
    float weight;
    __device__ __forceinline__ void pair(int64_t n, float x, float y) const {
      if (bias) {
        const float2 b = load_pair(bias, n, o.N, false);
        x += b.x, y += b.y;
      }
      store_pair(out, n, o.N, o.whole, {x * weight, y * weight});
    }
  };
  __device__ __forceinline__ Row row(int64_t e, int64_t r) const {
    return {*this, static_cast<T*>(a.out) + r * a.out_stride,
            a.bias && e < E ? static_cast<const T*>(a.bias) + e * N : nullptr, a.weight && e < E ? a.weight[r] : 1.f};
  }
};

// ---- h = C + bias, a = act(h_gate) * h_up
template <class T, class Act> struct GatedForwardEpilogue {
  using Arguments = GatedForward;
  GatedForward a;
  int64_t F;
  bool whole;
  __device__ GatedForwardEpilogue(const RowsProblem& p, const GatedForward& arguments)
      : a(arguments), F(p.N), whole(whole_pairs<T>(a.h, F, F) && whole_pairs<T>(a.a, F, F)) {}

  struct Row {
    const GatedForwardEpilogue& o;
    const T* bias;
    T *h, *out;
    __device__ __forceinline__ void pair(int64_t f, float2 gate, float2 up) const {
      if (bias) {
        const float2 b = load_pair(bias, f, o.F, false), c = load_pair(bias + o.F, f, o.F, false);
        gate.x += b.x, gate.y += b.y, up.x += c.x, up.y += c.y;
      }
      if (h) store_pair(h, f, o.F, o.whole, gate), store_pair(h + o.F, f, o.F, o.whole, up);
      if (out) store_pair(out, f, o.F, o.whole, {o.one(gate.x, up.x), o.one(gate.y, up.y)});
    }
  };
  __device__ __forceinline__ float one(float gate, float up) const {
    return Act::value(clamp_gate(gate, a.clamp)) * clamp_up(up, a.clamp);
  }
  __device__ __forceinline__ Row row(int64_t e, int64_t r) const {
    return {*this, a.bias ? static_cast<const T*>(a.bias) + e * 2 * F : nullptr,
            a.h ? static_cast<T*>(a.h) + r * 2 * F : nullptr, a.a ? static_cast<T*>(a.a) + r * F : nullptr};
  }
};

// ---- from C = dA and the saved h: dh, weight * a, and the routing weight's gradient
template <class T, class Act> struct GatedBackwardEpilogue {
  using Arguments = GatedBackward;
  GatedBackward a;
  int64_t F, R;
  bool whole;
  __device__ GatedBackwardEpilogue(const RowsProblem& p, const GatedBackward& arguments)
      : a(arguments),
        F(p.N),
        R(p.R),
        whole(whole_pairs<T>(a.h, F, F) && whole_pairs<T>(a.dh, F, F) && whole_pairs<T>(a.a_weighted, F, F)) {}

  struct One {
    float dgate, dup, a_weighted;
  };
  struct Row {
    const GatedBackwardEpilogue& o;
    int64_t r;  // negative: no row, only there for finish
    float weight, dot;
    __device__ __forceinline__ One one(float da, float gate, float up) {
      const float limit = o.a.clamp;
      const Slope act = Act::both(clamp_gate(gate, limit));
      const float u = clamp_up(up, limit), value = act.value * u, d = da * weight;
      dot = fmaf(da, value, dot);
      return {gate > limit ? 0.f : d * u * act.slope, u != up ? 0.f : d * act.value, value * weight};
    }
    __device__ __forceinline__ void pair(int64_t f, float x, float y) {
      const T* h = static_cast<const T*>(o.a.h) + r * 2 * o.F;
      const float2 gate = load_pair(h, f, o.F, o.whole), up = load_pair(h + o.F, f, o.F, o.whole);
      const One v = one(x, gate.x, up.x), w = one(y, gate.y, up.y);
      if (o.a.dh) {
        T* dh = static_cast<T*>(o.a.dh) + r * 2 * o.F;
        store_pair(dh, f, o.F, o.whole, {v.dgate, w.dgate}), store_pair(dh + o.F, f, o.F, o.whole, {v.dup, w.dup});
      }
      if (o.a.a_weighted)
        store_pair(static_cast<T*>(o.a.a_weighted) + r * o.F, f, o.F, o.whole, {v.a_weighted, w.a_weighted});
    }
    // Adds the sums of the four lanes that share the row.
    __device__ __forceinline__ void finish(int64_t n) {
      if (!o.a.dot) return;
      dot += __shfl_xor_sync(~0u, dot, 1);
      dot += __shfl_xor_sync(~0u, dot, 2);
      if (r >= 0 && n < o.F && threadIdx.x % 4 == 0) o.a.dot[n / kDotColumns * o.R + r] = dot;
    }
  };
  __device__ __forceinline__ Row row(int64_t, int64_t r) const {
    return {*this, r, a.weight && r >= 0 ? a.weight[r] : 1.f, 0.f};
  }
};

// ---- out[e][m, n] = C or += C. TOut is T or float.
template <class TOut, bool kAccumulate> struct StoreGradEpilogue {
  Stacked<void*> out;
  int64_t N;
  bool whole;
  __device__ StoreGradEpilogue(const WgradProblem& p, const StoreGrad& arguments)
      : out(arguments.out),
        N(p.N),
        whole(whole_pairs<TOut>(out.first, N, out.row_stride) && whole_pairs<TOut>(out.second, N, out.expert_stride)) {}

  struct Row {
    const StoreGradEpilogue& o;
    TOut* to;
    __device__ __forceinline__ void pair(int64_t n, float x, float y) const {
      if constexpr (kAccumulate) {
        const float2 old = load_pair(to, n, o.N, o.whole);
        x += old.x, y += old.y;
      }
      store_pair(to, n, o.N, o.whole, {x, y});
    }
  };
  __device__ __forceinline__ Row row(int64_t e, int64_t m) const {
    return {*this, static_cast<TOut*>(m < out.split ? out.first : out.second) + out.at(e, m)};
  }
};
}  // namespace sail::cuda
