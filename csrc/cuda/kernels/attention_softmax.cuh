// Scores in the accumulators of mma and wgmma, whose layout is the same: masked, made probabilities, rounded to what the
// next product takes as its first operand, and results stored.
#pragma once
#include "epilogues.cuh"
#include "ptx.cuh"

namespace sail::cuda {
constexpr float kLn2 = 0.6931471805599453f, kLog2E = 1.4426950408889634f;

template <int kF, int kColumns> using Fragments = float[kF][kColumns / 8][4];  // 16 kF rows of a warp

// ---- what a lane has of a warp's fragments: rows lane / 4 + 8 * (2 i + octet), columns 2 * (lane % 4) + 8 j and the next
__device__ __forceinline__ int lane_row() { return static_cast<int>(threadIdx.x) % 32 / 4; }
__device__ __forceinline__ int lane_column() { return static_cast<int>(threadIdx.x) % 4 * 2; }

template <int kF, int kN8> __device__ __forceinline__ void clear(float (&c)[kF][kN8][4]) {
#pragma unroll
  for (int i = 0; i < kF; i++)
#pragma unroll
    for (int j = 0; j < kN8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) c[i][j][e] = 0.f;
}

// Sets the columns after `last` to `to`.
template <int kN8> __device__ __forceinline__ void mask(float (&s)[kN8][4], int octet, int last, float to) {
#pragma unroll
  for (int j = 0; j < kN8; j++)
#pragma unroll
    for (int e = 0; e < 2; e++)
      if (8 * j + e > last - lane_column()) s[j][2 * octet + e] = to;
}

template <int kF, int kN8> __device__ __forceinline__ void negate(float (&s)[kF][kN8][4]) {
#pragma unroll
  for (int i = 0; i < kF; i++)
#pragma unroll
    for (int j = 0; j < kN8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[i][j][e] = -s[i][j][e];
}

// Stores factor(i, octet) * rows; to(i, octet) is where row 16 i + 8 octet + lane_row() goes, null: nowhere.
template <int kF, int kD8, class To, class Factor>
__device__ __forceinline__ void store_rows(const float (&c)[kF][kD8][4], int D, To to, Factor factor) {
#pragma unroll
  for (int i = 0; i < kF; i++)
#pragma unroll
    for (int octet = 0; octet < 2; octet++) {
      auto* row = to(i, octet);
      const float f = factor(i, octet);
#pragma unroll
      for (int j = 0; j < kD8; j += 4) {
        float2 pairs[4] = {};
        float v[8];
#pragma unroll
        for (int t = 0; t < 4; t++)
          if (j + t < kD8) pairs[t] = {c[i][j + t][octet * 2] * f, c[i][j + t][octet * 2 + 1] * f};
        turn_quad(pairs);
#pragma unroll
        for (int t = 0; t < 4; t++) v[2 * t] = pairs[t].x, v[2 * t + 1] = pairs[t].y;
        if (row) store_vector8<true>(row, (j + static_cast<int>(threadIdx.x) % 4) * 8, D, v);
      }
    }
}

__device__ __forceinline__ uint32_t pack(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}
__device__ __forceinline__ uint32_t pack(__half, float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// Accumulators, rounded, as the first operand of the next product: [16 rows][16 columns][4]
template <int kF, int kColumns> using Rounded = uint32_t[kF][kColumns / 16][4];
template <class T, int kF, int kN8, int kN16>
__device__ __forceinline__ void round_rows(uint32_t (&a)[kF][kN16][4], const float (&p)[kF][kN8][4]) {
#pragma unroll
  for (int i = 0; i < kF; i++)
#pragma unroll
    for (int n = 0; n < kN16; n++)
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const float (&from)[4] = p[i][2 * n + r / 2];
        a[i][n][r] = pack(T{}, from[r % 2 * 2], from[r % 2 * 2 + 1]);
      }
}

// max and sum of the softmax's exponentials, in units of log2; a lane's sum is of its own columns
template <int kF> struct Softmax {
  float max[kF][2], sum[kF][2], factor[kF][2];
  bool changed;

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int i = 0; i < kF; i++) max[i][0] = max[i][1] = -INFINITY, sum[i][0] = sum[i][1] = 0.f;
  }
  // What is taken off the scores: a row that has seen nothing has no maximum.
  __device__ __forceinline__ float base(int i, int octet, float scale) const {
    return max[i][octet] == -INFINITY ? 0.f : __fmul_rn(max[i][octet], scale);
  }

  // scores -> probabilities, not yet divided. What was summed under the old maximum is to be multiplied by `factor`.
  template <int kN8> __device__ __forceinline__ void update(float (&s)[kF][kN8][4], float scale) {
    changed = false;
#pragma unroll
    for (int i = 0; i < kF; i++)
#pragma unroll
      for (int octet = 0; octet < 2; octet++) {
        const float old = max[i][octet];
        float m = old;
#pragma unroll
        for (int j = 0; j < kN8; j++) m = fmaxf(m, fmaxf(s[i][j][2 * octet], s[i][j][2 * octet + 1]));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        max[i][octet] = m;
        const float off = base(i, octet, scale);
        factor[i][octet] = ptx::exp2(__fmul_rn(old, scale) - off);  // exactly 1 where the maximum stays
        changed = changed || m != old;
        float total = sum[i][octet] * factor[i][octet];
#pragma unroll
        for (int j = 0; j < kN8; j++)
#pragma unroll
          for (int e = 2 * octet; e < 2 * octet + 2; e++) {
            s[i][j][e] = ptx::exp2(fmaf(s[i][j][e], scale, -off));
            total += s[i][j][e];
          }
        sum[i][octet] = total;
      }
  }
  template <int kD8> __device__ __forceinline__ void rescale(float (&o)[kF][kD8][4]) const {
    if (!__any_sync(~0u, changed)) return;  // after the first tiles it is rare that a row's maximum rises
#pragma unroll
    for (int i = 0; i < kF; i++)
#pragma unroll
      for (int j = 0; j < kD8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) o[i][j][e] *= factor[i][e / 2];
  }

  // Sums over the four lanes of a row; then log2 of the denominator, and 1 / denominator or 0.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int i = 0; i < kF; i++)
#pragma unroll
      for (int octet = 0; octet < 2; octet++) {
        sum[i][octet] += __shfl_xor_sync(~0u, sum[i][octet], 1);
        sum[i][octet] += __shfl_xor_sync(~0u, sum[i][octet], 2);
      }
  }
  __device__ __forceinline__ float log2_sum(int i, int octet, float scale) const {
    return base(i, octet, scale) + log2f(sum[i][octet]);
  }
  __device__ __forceinline__ float inverse(int i, int octet) const {
    return sum[i][octet] == 0.f ? 0.f : 1.f / sum[i][octet];
  }
};
}  // namespace sail::cuda
