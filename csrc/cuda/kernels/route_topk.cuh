// The router: one warp a token. Softmax in fp32, the K best one after another, and the batch statistics without atomics
// on floats: a warp adds its tokens' probabilities in its own row of shared memory, a block writes one row of partial
// sums, and sum_statistics_kernel adds those in a fixed order.
#pragma once
#include "elements.cuh"

namespace sail::cuda {
constexpr int kRouteMaxWarps = 8, kRouteMaxTokens = 8;  // of a block; of a warp, one after another
constexpr int64_t kRouteShared = 48 * 1024;             // dynamic, without opting in to more

struct Route {
  const void* logits;  // [T, E], rows `stride` elements apart
  int64_t stride;
  const float* bias;   // [E] or null
  const void* replay;  // [T, K] or null: the ids to use instead of choosing
  bool wide_replay;    // int64, otherwise int32
  const bool* mask;    // [T] or null: all counted
  int64_t* ids;        // [T, K]
  float* weights;      // [T, K]
  float* sums;         // [blocks, E]
  int32_t* counts;     // [blocks, E]
  int64_t T;
  int32_t E, K, tokens;  // tokens: of a warp
  bool renormalize;
};

struct RouteBackward {
  const void* logits;
  int64_t stride;
  const void* ids;  // [T, K]
  bool wide_ids;
  const float *grad_weights, *grad_prob_sum;  // [T, K] and [E], either null
  const bool* mask;
  void* dlogits;  // [T, E]
  int64_t T;
  int32_t E, K;
  bool renormalize;
};

// Bytes of shared memory: a warp's probabilities, keys and sums, the block's counts.
constexpr int64_t route_shared(int64_t E, int64_t warps) { return (3 * warps + 1) * E * 4; }
constexpr int64_t kRouteMaxExperts = kRouteShared / (4 * 4);

struct RoutePlan {
  int warps, tokens;
  int64_t blocks;
};
// As many tokens a warp as keep 264 blocks, two for each SM of an H100, busy.
constexpr RoutePlan plan_route(int64_t T, int64_t E) {
  int warps = kRouteMaxWarps;
  while (warps > 1 && route_shared(E, warps) > kRouteShared) warps /= 2;
  const int64_t even = T / (264 * warps);
  const int64_t tokens = even < 1 ? 1 : even > kRouteMaxTokens ? kRouteMaxTokens : even;
  return {warps, static_cast<int>(tokens), (T + warps * tokens - 1) / (warps * tokens)};
}

template <class T> __device__ T warp_max(T v) {
  for (int o = 16; o; o /= 2) {
    const T other = __shfl_xor_sync(~0u, v, o);
    v = other > v ? other : v;
  }
  return v;
}
__device__ inline float warp_sum(float v) {
  for (int o = 16; o; o /= 2) v += __shfl_xor_sync(~0u, v, o);
  return v;
}

// probs = softmax(logits); a NaN makes all of them NaN, as in torch. Lane l owns the experts e with e % 32 == l.
template <class T> __device__ void softmax_row(const T* logits, float* probs, int E, int lane) {
  float top = -INFINITY, total = 0.f;
  for (int e = lane; e < E; e += 32) {
    probs[e] = static_cast<float>(logits[e]);
    top = fmaxf(top, probs[e]);
  }
  top = warp_max(top);
  for (int e = lane; e < E; e += 32) {
    probs[e] = expf(probs[e] - top);
    total += probs[e];
  }
  total = warp_sum(total);
  for (int e = lane; e < E; e += 32) probs[e] /= total;
  __syncwarp();
}

// An integer that compares like the score, NaN above all.
__device__ inline int32_t sort_key(float score) {
  const int32_t bits = __float_as_int(score);
  return score != score ? INT32_MAX : bits ^ ((bits >> 31) & INT32_MAX);
}

__device__ inline int64_t id_at(const void* ids, bool wide, int64_t at) {
  return wide ? static_cast<const int64_t*>(ids)[at] : static_cast<const int32_t*>(ids)[at];
}

// The best expert that is left, ties to the lower id; it is taken.
__device__ inline int take_best(int32_t* keys, int E, int lane) {
  long long best = INT64_MIN;
  for (int e = lane; e < E; e += 32) {
    const long long candidate = static_cast<long long>(keys[e]) * (1ll << 32) + (INT32_MAX - e);
    best = candidate > best ? candidate : best;
  }
  best = warp_max(best);
  const int id = INT32_MAX - static_cast<int32_t>(best & 0xffffffff);
  if (id % 32 == lane) keys[id] = INT32_MIN;  // below the key of -inf
  return id;
}

template <class T> __global__ void route_topk_kernel(Route a) {
  float* shared = dynamic_shared<float>();
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float *probs = shared + warp * a.E, *sums = shared + (warps + warp) * a.E;
  int32_t* keys = reinterpret_cast<int32_t*>(shared) + (2 * warps + warp) * a.E;
  int32_t* counts = reinterpret_cast<int32_t*>(shared) + 3 * warps * a.E;
  for (int e = threadIdx.x; e < a.E; e += blockDim.x) counts[e] = 0;
  for (int e = lane; e < a.E; e += 32) sums[e] = 0.f;
  __syncthreads();
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * warps + warp) * a.tokens;
  const int64_t end = first + a.tokens < a.T ? first + a.tokens : a.T;
  for (int64_t t = first; t < end; t++) {
    softmax_row(static_cast<const T*>(a.logits) + t * a.stride, probs, a.E, lane);
    const bool counted = !a.mask || a.mask[t];
    if (!a.replay)
      for (int e = lane; e < a.E; e += 32) keys[e] = sort_key(a.bias ? probs[e] + a.bias[e] : probs[e]);
    double total = 0;
    for (int k = 0; k < a.K; k++) {
      const int64_t id = a.replay ? id_at(a.replay, a.wide_replay, t * a.K + k) : take_best(keys, a.E, lane);
      const bool inside = id >= 0 && id < a.E;  // a replayed one may not be: it weighs nothing
      if (inside) total += static_cast<double>(probs[id]);
      if (k % 32 != lane) continue;
      a.ids[t * a.K + k] = id;
      a.weights[t * a.K + k] = inside ? probs[id] : 0.f;
      if (inside && counted) atomicAdd(&counts[id], 1);
    }
    if (a.renormalize)
      for (int k = lane; k < a.K; k += 32) a.weights[t * a.K + k] /= static_cast<float>(total);
    if (counted)
      for (int e = lane; e < a.E; e += 32) sums[e] += probs[e];
    __syncwarp();
  }
  __syncthreads();
  for (int e = threadIdx.x; e < a.E; e += blockDim.x) {
    float sum = 0.f;
    for (int w = 0; w < warps; w++) sum += shared[(warps + w) * a.E + e];
    a.sums[static_cast<int64_t>(blockIdx.x) * a.E + e] = sum;
    a.counts[static_cast<int64_t>(blockIdx.x) * a.E + e] = counts[e];
  }
}

// counts[e] and prob_sum[e]: sums over the rows of [blocks, E]. A block is kStatisticsColumns x kStatisticsGroups threads.
constexpr int kStatisticsColumns = 32, kStatisticsGroups = 8;
__global__ void sum_statistics_kernel(const float* sums, const int32_t* counts, int64_t blocks, int E, int64_t* count,
                                      float* prob_sum) {
  __shared__ double group_sum[kStatisticsGroups][kStatisticsColumns];
  __shared__ int64_t group_count[kStatisticsGroups][kStatisticsColumns];
  const int e = blockIdx.x * kStatisticsColumns + threadIdx.x;
  double sum = 0;
  int64_t n = 0;
  if (e < E)
    for (int64_t b = threadIdx.y; b < blocks; b += kStatisticsGroups)
      sum += static_cast<double>(sums[b * E + e]), n += counts[b * E + e];
  group_sum[threadIdx.y][threadIdx.x] = sum, group_count[threadIdx.y][threadIdx.x] = n;
  __syncthreads();
  if (threadIdx.y || e >= E) return;
  for (int g = 1; g < kStatisticsGroups; g++) sum += group_sum[g][threadIdx.x], n += group_count[g][threadIdx.x];
  count[e] = n, prob_sum[e] = static_cast<float>(sum);
}

// dp = grad_prob_sum + scatter(dweights), through w = p / sum(p) if renormalized; dlogits = p (dp - sum(p dp)).
// The sums over K are fp64: dw - dot cancels.
template <class T> __global__ void route_topk_backward_kernel(RouteBackward a) {
  float* shared = dynamic_shared<float>();
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float *probs = shared + warp * a.E, *dprobs = shared + (warps + warp) * a.E;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * warps + warp;
  if (t >= a.T) return;  // whole warps
  softmax_row(static_cast<const T*>(a.logits) + t * a.stride, probs, a.E, lane);
  const bool counted = a.grad_prob_sum && (!a.mask || a.mask[t]);
  for (int e = lane; e < a.E; e += 32) dprobs[e] = counted ? a.grad_prob_sum[e] : 0.f;
  if (a.grad_weights) {
    double total = 1, dot = 0;
    const float* dw = a.grad_weights + t * a.K;
    if (a.renormalize) {
      total = 0;
      for (int k = 0; k < a.K; k++) {
        const int64_t id = id_at(a.ids, a.wide_ids, t * a.K + k);
        if (id < 0 || id >= a.E) continue;
        total += static_cast<double>(probs[id]);
        dot += static_cast<double>(dw[k]) * static_cast<double>(probs[id]);
      }
      dot /= total;
    }
    for (int k = 0; k < a.K; k++) {
      const int64_t id = id_at(a.ids, a.wide_ids, t * a.K + k);
      if (id >= 0 && id < a.E && id % 32 == lane)
        dprobs[id] += static_cast<float>((static_cast<double>(dw[k]) - dot) / total);
    }
  }
  float mean = 0.f;
  for (int e = lane; e < a.E; e += 32) mean = fmaf(probs[e], dprobs[e], mean);
  mean = warp_sum(mean);
  T* out = static_cast<T*>(a.dlogits) + t * a.E;
  for (int e = lane; e < a.E; e += 32) out[e] = static_cast<T>(probs[e] * (dprobs[e] - mean));
}
}  // namespace sail::cuda
