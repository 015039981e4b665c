// What follows the grouped products of an expert layer, each bound by memory: gather-sums over a token's rows, sums over
// an expert's rows, the routing weights' gradient. All sums are fp32 in an order that the shapes fix.
// T tokens, D hidden, E experts, K top-k, R routed rows.
#pragma once
#include "elements.cuh"

namespace sail::cuda {
// Adds chains of a few terms with compensation (Kahan), so that a long sum is as exact as a short one.
template <int N> struct ChainSum {
  float total[N] = {}, lost[N] = {};
  __device__ void add(const float (&chain)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float more = __fsub_rn(chain[i], lost[i]), next = __fadd_rn(total[i], more);
      lost[i] = __fsub_rn(__fsub_rn(next, total[i]), more);
      total[i] = next;
    }
  }
};

// out[t] = sum_k weight[r] * rows[r], r = row_of[t, k]; a dropped (token, slot) has r = -1 and is not read.
struct Combine {
  const void* rows;       // [R, D]
  const int32_t* row_of;  // [T, K]
  const float* weight;    // [R]; null: ones
  void* out;              // [T, D]
  int64_t D;
  int32_t K;
};
constexpr int kCombineChain = 8;  // rows whose loads are in flight together: 128 bytes a thread

// One block a token.
template <class T, int N> __global__ void combine_kernel(Combine a) {
  const int64_t t = blockIdx.x;
  const int32_t* row_of = a.row_of + t * a.K;
  for (int64_t c = threadIdx.x * N; c < a.D; c += static_cast<int64_t>(blockDim.x) * N) {
    ChainSum<N> sum;
    for (int k0 = 0; k0 < a.K; k0 += kCombineChain) {
      Vec<T, N> v[kCombineChain];
      int32_t row[kCombineChain];
#pragma unroll
      for (int i = 0; i < kCombineChain; i++) {
        row[i] = k0 + i < a.K ? row_of[k0 + i] : -1;
        if (row[i] >= 0) v[i] = *reinterpret_cast<const Vec<T, N>*>(static_cast<const T*>(a.rows) + row[i] * a.D + c);
      }
      float chain[N] = {};
#pragma unroll
      for (int i = 0; i < kCombineChain; i++) {
        if (row[i] < 0) continue;
        const float weight = a.weight ? a.weight[row[i]] : 1.f;
#pragma unroll
        for (int j = 0; j < N; j++) chain[j] = fmaf(static_cast<float>(v[i].v[j]), weight, chain[j]);
      }
      sum.add(chain);
    }
    store(static_cast<T*>(a.out) + t * a.D + c, sum.total);
  }
}

// out[e] = sum over the rows of expert e of weight[r] * in[index[r]]: gradients of biases.
struct ExpertSum {
  const void* in;          // [., columns], rows `stride` elements apart
  const int32_t* index;    // [R]; null: r itself
  const float* weight;     // [R]; null: ones
  const int32_t* offsets;  // [E + 1]
  void* out;               // [E, columns]
  int64_t columns, stride;
};
constexpr int kExpertSumLanes = 32, kExpertSumGroups = 8, kExpertSumChain = 16;

// Blocks: columns by experts; a block's 8 groups take every eighth row.
template <class T, int N> __global__ void expert_sum_kernel(ExpertSum a) {
  __shared__ float group[kExpertSumGroups][kExpertSumLanes * N];
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * kExpertSumLanes + threadIdx.x) * N;
  const int e = blockIdx.y;
  ChainSum<N> sum;
  if (c < a.columns) {
    const int32_t end = a.offsets[e + 1];
    for (int64_t r = a.offsets[e] + threadIdx.y; r < end;) {
      float chain[N] = {};
      for (int i = 0; i < kExpertSumChain && r < end; i++, r += kExpertSumGroups) {
        float v[N];
        load(static_cast<const T*>(a.in) + (a.index ? a.index[r] : r) * a.stride + c, v);
        const float weight = a.weight ? a.weight[r] : 1.f;
#pragma unroll
        for (int j = 0; j < N; j++) chain[j] = fmaf(v[j], weight, chain[j]);
      }
      sum.add(chain);
    }
  }
#pragma unroll
  for (int j = 0; j < N; j++) group[threadIdx.y][threadIdx.x * N + j] = sum.total[j];
  __syncthreads();
  if (threadIdx.y || c >= a.columns) return;
  for (int g = 1; g < kExpertSumGroups; g++) {
    float more[N];
#pragma unroll
    for (int j = 0; j < N; j++) more[j] = group[g][threadIdx.x * N + j];
    sum.add(more);
  }
  store(static_cast<T*>(a.out) + e * a.columns + c, sum.total);
}

// The expert that owns row r < offsets[E].
__device__ inline int expert_of_row(const int32_t* offsets, int E, int32_t r) {
  int low = 0, high = E;  // offsets[low] <= r < offsets[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (offsets[middle] <= r ? low : high) = middle;
  }
  return low;
}

// out[i] = sum of the row's partial dot products <dA, A>, plus <dy, down_bias>; 0 where i has no row.
struct RoutingGradient {
  const float* partial;    // [tiles, R]
  const int32_t* row_of;   // [count]; null: rows come sorted, i itself, as far as offsets[E]
  const int32_t* offsets;  // [E + 1]
  const void *dy, *bias;   // [T, D] and [E, D]; bias null: none
  float* out;              // [count]
  int64_t count, R, D;
  int32_t E, K, tiles;
};

// One warp a routing weight.
template <class T> __global__ void routing_gradient_kernel(RoutingGradient a) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (i >= a.count) return;  // whole warps
  const int64_t r = a.row_of ? a.row_of[i] : i < a.offsets[a.E] ? i : -1;
  float sum = 0.f;
  if (r >= 0) {
    for (int tile = lane; tile < a.tiles; tile += 32) sum += a.partial[tile * a.R + r];
    if (a.bias) {
      const T* dy = static_cast<const T*>(a.dy) + i / a.K * a.D;
      const T* bias = static_cast<const T*>(a.bias) + expert_of_row(a.offsets, a.E, static_cast<int32_t>(r)) * a.D;
      for (int64_t c = lane; c < a.D; c += 32) sum = fmaf(static_cast<float>(dy[c]), static_cast<float>(bias[c]), sum);
    }
  }
  for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  if (lane == 0) a.out[i] = sum;
}
}  // namespace sail::cuda
