// What becomes of the products, eight adjacent columns of a row at a time: 16 bytes of bf16 or fp16, one access.
// The fragments of mma.sync and of wgmma hold two columns of every eight in a lane and share a row among four lanes;
// turn_quad gives each of the four a whole eight, of four neighboring ones. A mainloop makes an epilogue, calls row(e, r)
// once for each of its rows r, and of what it gets
//   store8(n, v)           for columns n .. n + 7, n a multiple of 8
//   store8(f, gate, up)    kHalves: for columns f .. f + 7 of both
//   finish(n)             kFinish: after the kDotColumns columns from n, by all lanes of the warp; a lane without a row
//                         has asked for row(e, -1) and calls nothing else
// Columns past the last are not stored. kWhole: every eight of every matrix starts on 16 bytes, and the columns are a
// multiple of 8; `whole` says on the host whether they are. The arguments are those of grouped_gemm.h; T is the element.
#pragma once
#include "elements.cuh"
#include "grouped_gemm.h"

namespace sail::cuda {
// v[t] in lane q of four: columns 2 q and 2 q + 1 of eight t. After: v[s] is columns 2 s and 2 s + 1 of eight q.
// By all lanes of the warp.
__device__ __forceinline__ void turn_quad(float2 (&v)[4]) {
  const int q = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int d = 1; d < 4; d *= 2) {
    const bool upper = q & d;
#pragma unroll
    for (int t = 0; t < 4; t++) {
      if (t & d) continue;
      const float2 low = v[t], high = v[t | d], send = upper ? low : high;
      const float2 got = {__shfl_xor_sync(~0u, send.x, d), __shfl_xor_sync(~0u, send.y, d)};
      v[t] = upper ? got : low;
      v[t | d] = upper ? high : got;
    }
  }
}

inline bool whole_vectors(const void* p, int64_t columns, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && columns % 8 == 0 && stride % 8 == 0;
}

// Columns n .. n + 7 of a row of N
template <bool kWhole, class T> __device__ __forceinline__ void store_vector8(T* row, int n, int N, float (&v)[8]) {
  if constexpr (kWhole) {
    if (n >= N) return;
    constexpr int kVector = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < 8; i += kVector) store(row + n + i, *reinterpret_cast<float (*)[kVector]>(v + i));
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (n + i < N) row[n + i] = static_cast<T>(v[i]);
  }
}
template <bool kWhole, class T>
__device__ __forceinline__ void load_vector8(const T* row, int n, int N, float (&v)[8]) {
  if constexpr (kWhole) {
    constexpr int kVector = 16 / sizeof(T);
    const int from = n < N ? n : 0;  // what lies past the end is not used, only read
#pragma unroll
    for (int i = 0; i < 8; i += kVector) load(row + from + i, *reinterpret_cast<float (*)[kVector]>(v + i));
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = n + i < N ? static_cast<float>(row[n + i]) : 0.f;
  }
}

// ---- activations: the value, and with it the derivative
struct Slope {
  float value, slope;
};
__device__ __forceinline__ float fast_sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
struct Silu {
  __device__ explicit Silu(Activation) {}
  __device__ __forceinline__ float value(float x) const { return x * fast_sigmoid(x); }
  __device__ __forceinline__ Slope both(float x) const {
    const float s = fast_sigmoid(x);
    return {x * s, s * (1.f + x * (1.f - s))};
  }
};
// Both kinds of GELU, so that each costs no kernel of its own: x times a distribution function, 0.5 (1 + erf(x / sqrt 2))
// or 0.5 (1 + tanh(u)) = sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
struct Gelu {
  bool tanh;
  __device__ explicit Gelu(Activation a) : tanh(a == Activation::gelu_tanh) {}
  __device__ __forceinline__ float cdf(float x) const {
    if (tanh) return fast_sigmoid(x * (1.5957691f + 0.071354814f * x * x));
    return 0.5f * erfcf(x * -0.70710678f);  // keeps the left tail
  }
  __device__ __forceinline__ float value(float x) const { return x * cdf(x); }
  __device__ __forceinline__ Slope both(float x) const {
    const float c = cdf(x);
    const float density =
        tanh ? c * (1.f - c) * (1.5957691f + 0.21406444f * x * x) : 0.39894228f * __expf(x * x * -0.5f);
    return {x * c, c + x * density};
  }
};
// Calls f with a null pointer of the activation's type.
template <class F> auto for_activation(Activation a, F f) {
  return a == Activation::silu ? f(static_cast<Silu*>(nullptr)) : f(static_cast<Gelu*>(nullptr));
}

__device__ __forceinline__ float clamp_gate(float g, float limit) { return g > limit ? limit : g; }  // keeps NaN
__device__ __forceinline__ float clamp_up(float u, float limit) { return u > limit ? limit : u < -limit ? -limit : u; }

// ---- out[r, n] = (C[r, n] + bias[e, n]) * weight[r]
template <class T, bool kWhole> struct StoreRowsEpilogue {
  using Arguments = StoreRows;
  static constexpr bool kHalves = false, kFinish = false;
  static bool whole(const RowsProblem& p, const StoreRows& a) {
    return whole_vectors(a.out, p.N, a.out_stride) && whole_vectors(a.bias, p.N, p.N);
  }
  StoreRows a;
  int64_t N, E;
  __device__ StoreRowsEpilogue(const RowsProblem& p, const StoreRows& arguments) : a(arguments), N(p.N), E(p.E) {}

  struct Row {
    T* out;
    const T* bias;
    float weight;
    int N;
    __device__ __forceinline__ void store8(int n, float (&v)[8]) const {
      float b[8] = {};
      if (bias) load_vector8<kWhole>(bias, n, N, b);
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] = (v[i] + b[i]) * weight;
      store_vector8<kWhole>(out, n, N, v);
    }
  };
  __device__ __forceinline__ Row row(int64_t e, int64_t r) const {
    return {static_cast<T*>(a.out) + r * a.out_stride,
            a.bias && e < E ? static_cast<const T*>(a.bias) + e * N : nullptr, a.weight && e < E ? a.weight[r] : 1.f,
            static_cast<int>(N)};
  }
};

// ---- h = C + bias, a = act(h_gate) * h_up
template <class T, class Act, bool kWhole> struct GatedForwardEpilogue {
  using Arguments = GatedForward;
  static constexpr bool kHalves = true, kFinish = false;
  static bool whole(const RowsProblem& p, const GatedForward& a) {
    return whole_vectors(a.bias, p.N, p.N) && whole_vectors(a.h, p.N, p.N) && whole_vectors(a.a, p.N, p.N);
  }
  GatedForward a;
  int64_t F;
  __device__ GatedForwardEpilogue(const RowsProblem& p, const GatedForward& arguments) : a(arguments), F(p.N) {}

  struct Row {
    const T* bias;
    T *h, *out;
    int F;
    float clamp;
    Act act;
    __device__ __forceinline__ void store8(int f, float (&gate)[8], float (&up)[8]) const {
      if (bias) {
        float b[8], c[8];
        load_vector8<kWhole>(bias, f, F, b), load_vector8<kWhole>(bias + F, f, F, c);
#pragma unroll
        for (int i = 0; i < 8; i++) gate[i] += b[i], up[i] += c[i];
      }
      if (h) store_vector8<kWhole>(h, f, F, gate), store_vector8<kWhole>(h + F, f, F, up);
      if (!out) return;
#pragma unroll
      for (int i = 0; i < 8; i++) gate[i] = act.value(clamp_gate(gate[i], clamp)) * clamp_up(up[i], clamp);
      store_vector8<kWhole>(out, f, F, gate);
    }
  };
  __device__ __forceinline__ Row row(int64_t e, int64_t r) const {
    return {a.bias ? static_cast<const T*>(a.bias) + e * 2 * F : nullptr,
            a.h ? static_cast<T*>(a.h) + r * 2 * F : nullptr,
            a.a ? static_cast<T*>(a.a) + r * F : nullptr,
            static_cast<int>(F),
            a.clamp,
            Act(a.activation)};
  }
};

// ---- from C = dA and the saved h: dh, weight * a, and the routing weight's gradient
template <class T, class Act, bool kWhole> struct GatedBackwardEpilogue {
  using Arguments = GatedBackward;
  static constexpr bool kHalves = false, kFinish = true;
  static bool whole(const RowsProblem& p, const GatedBackward& a) {
    return whole_vectors(a.h, p.N, p.N) && whole_vectors(a.dh, p.N, p.N) && whole_vectors(a.a_weighted, p.N, p.N);
  }
  GatedBackward a;
  int64_t F, R;
  __device__ GatedBackwardEpilogue(const RowsProblem& p, const GatedBackward& arguments)
      : a(arguments), F(p.N), R(p.R) {}

  struct Row {
    const GatedBackwardEpilogue& o;
    int64_t r;  // negative: no row
    float weight, dot;
    __device__ __forceinline__ void store8(int f, float (&da)[8]) {
      const int F = static_cast<int>(o.F);
      const int64_t at = r * o.F;
      const float clamp = o.a.clamp;
      const Act act(o.a.activation);
      float gate[8], up[8];
      const T* h = static_cast<const T*>(o.a.h) + 2 * at;
      load_vector8<kWhole>(h, f, F, gate), load_vector8<kWhole>(h + F, f, F, up);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const Slope s = act.both(clamp_gate(gate[i], clamp));
        const float u = clamp_up(up[i], clamp), value = s.value * u, d = da[i] * weight;
        dot = fmaf(da[i], value, dot);  // da is zero past the last column
        gate[i] = gate[i] > clamp ? 0.f : d * u * s.slope;
        up[i] = up[i] > clamp || up[i] < -clamp ? 0.f : d * s.value;
        da[i] = value * weight;
      }
      if (o.a.dh) {
        T* dh = static_cast<T*>(o.a.dh) + 2 * at;
        store_vector8<kWhole>(dh, f, F, gate), store_vector8<kWhole>(dh + F, f, F, up);
      }
      if (o.a.a_weighted) store_vector8<kWhole>(static_cast<T*>(o.a.a_weighted) + at, f, F, da);
    }
    // Adds the sums of the four lanes that share the row.
    __device__ __forceinline__ void finish(int n) {
      dot += __shfl_xor_sync(~0u, dot, 1);
      dot += __shfl_xor_sync(~0u, dot, 2);
      if (o.a.dot && r >= 0 && n < o.F && threadIdx.x % 4 == 0) o.a.dot[n / kDotColumns * o.R + r] = dot;
    }
  };
  __device__ __forceinline__ Row row(int64_t, int64_t r) const {
    return {*this, r, a.weight && r >= 0 ? a.weight[r] : 1.f, 0.f};
  }
};

// ---- out[e][m, n] = C or += C. TOut is T or float.
template <class TOut, bool kAccumulate, bool kWhole> struct StoreGradEpilogue {
  static constexpr bool kHalves = false, kFinish = false;
  static bool whole(const WgradProblem& p, const StoreGrad& a) {
    return whole_vectors(a.out.first, p.N, a.out.row_stride) && whole_vectors(a.out.second, p.N, a.out.expert_stride);
  }
  Stacked<void*> out;
  int64_t N;
  __device__ StoreGradEpilogue(const WgradProblem& p, const StoreGrad& arguments) : out(arguments.out), N(p.N) {}

  struct Row {
    TOut* to;
    int N;
    __device__ __forceinline__ void store8(int n, float (&v)[8]) const {
      if constexpr (kAccumulate) {
        float old[8];
        load_vector8<kWhole>(to, n, N, old);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] += old[i];
      }
      store_vector8<kWhole>(to, n, N, v);
    }
  };
  __device__ __forceinline__ Row row(int64_t e, int64_t m) const {
    return {static_cast<TOut*>(m < out.split ? out.first : out.second) + out.at(e, m), static_cast<int>(N)};
  }
};
}  // namespace sail::cuda
