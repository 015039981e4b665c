// Rows over the threads of a block: blockDim.x threads a row, blockDim.y rows side by side, "slots". Up to 32 threads a
// row are a power of two, so that whole rows share a warp; more are whole warps.
#pragma once
#include "elements.cuh"
#include "ptx.cuh"

namespace sail::cuda {
constexpr int kRowThreads = 512;  // of a block, at most; leaves 128 registers a thread
// Elements of a kept row in each thread, read N at a time: two loads of 16 bytes in flight in bf16, four in fp32.
// Single elements need registers for their addresses too: 16 of them spilled.
template <int N> constexpr int kRowElements = N == 1 ? 4 : 16;

struct RowPlan {
  int threads, slots;
  bool kept;  // the row fits the registers of a block: up to 8192 elements
};
// `block`: threads that a block should have where rows are short
constexpr RowPlan plan_rows(int64_t D, int N, int block) {
  const int64_t elements = N == 1 ? kRowElements<1> : kRowElements<8>;
  if (D > elements * kRowThreads) return {kRowThreads, 1, false};
  const int wanted = static_cast<int>((D + elements - 1) / elements);
  int threads = 4;
  while (threads < wanted && threads < 32) threads *= 2;
  if (wanted > 32) threads = (wanted + 31) / 32 * 32;
  return {threads, threads < block ? block / threads : 1, true};
}

// Calls f(i, c) for this thread's vectors: columns c to c + N, the i-th of a kept row.
template <int N, bool kKept, class F> __device__ void for_columns(int64_t D, F f) {
  if constexpr (kKept) {
#pragma unroll
    for (int i = 0; i < kRowElements<N> / N; i++) {
      const int c = (i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * N;
      if (c < D) f(i, static_cast<int64_t>(c));
    }
  } else {
    for (int64_t c = threadIdx.x * N; c < D; c += blockDim.x * N) f(0, c);
  }
}

// This thread's part of a row: kept in registers as it lay in memory, or loaded again each time, from L1 or L2 then.
template <class T, int N, bool kKept> struct Row {
  const T* p;
  Vec<T, N> v[kKept ? kRowElements<N> / N : 1];

  __device__ void read(const T* row, int64_t D) {
    p = row;
    if constexpr (kKept) for_columns<N, true>(D, [&](int i, int64_t c) { v[i] = load_vector<N>(p + c); });
  }
  __device__ void get(int i, int64_t c, float (&out)[N]) const { widen(kKept ? v[i] : load_vector<N>(p + c), out); }
};

// The sums of M numbers over a row's threads, in every one of them, in an order that the row's length fixes. `turn`
// alternates between two buffers: one barrier a sum is then enough. Rows side by side do not wait for each other.
template <int M> __device__ void row_sum(float (&s)[M], int& turn) {
  __shared__ float part[2][M][kRowThreads / 32];
  const int lanes = blockDim.x < 32 ? blockDim.x : 32;
#pragma unroll
  for (int j = 0; j < M; j++)
    for (int o = lanes / 2; o; o /= 2) s[j] += __shfl_xor_sync(~0u, s[j], o);
  if (blockDim.x <= 32) return;
  const int warps = blockDim.x / 32, first = threadIdx.y * warps;
#pragma unroll
  for (int j = 0; j < M; j++)
    if (threadIdx.x % 32 == 0) part[turn][j][first + threadIdx.x / 32] = s[j];
  ptx::named_barrier(1 + threadIdx.y, blockDim.x);
#pragma unroll
  for (int j = 0; j < M; j++) {
    s[j] = 0.f;
    for (int i = 0; i < warps; i++) s[j] += part[turn][j][first + i];
  }
  turn ^= 1;
}

__device__ inline float inverse_root(float sum_of_squares, int64_t D, float eps) {
  return 1.f / sqrtf(sum_of_squares / static_cast<float>(D) + eps);
}

// Adds up what the slots of a block hold of each column, in the order of the slots, and writes to[0..D): warps of
// several rows by shuffles, warps by turns in shared memory, D floats of it. columns(f) calls f(i, c) for the columns c to
// c + N of v[i]. Every thread of the block calls it.
template <int K, int N, class Columns> __device__ void sum_slots(float (&v)[K][N], float* to, Columns columns) {
  float* shared = dynamic_shared<float>();
  const int rows_of_warp = blockDim.x < 32 ? 32 / blockDim.x : 1, turns = blockDim.y / rows_of_warp;
  for (int o = blockDim.x; o < 32; o *= 2) {
#pragma unroll
    for (int i = 0; i < K; i++)
#pragma unroll
      for (int j = 0; j < N; j++) v[i][j] += __shfl_xor_sync(~0u, v[i][j], o);
  }
  for (int turn = 0; turn < turns; turn++) {
    if (threadIdx.y == turn * rows_of_warp)
      columns([&](int i, int64_t c) {
#pragma unroll
        for (int j = 0; j < N; j++) {
          const float sum = turn ? shared[c + j] + v[i][j] : v[i][j];
          (turn + 1 < turns ? shared : to)[c + j] = sum;
        }
      });
    __syncthreads();
  }
}

// out[c] = sum over the rows of partial [rows, D], one or two of these: blockIdx.y says which. In fp64, as there may be
// many rows. A block is kSumColumns x kSumGroups threads.
struct ColumnSum {
  const float* partial;
  int64_t rows;
  void* out;
};
constexpr int kSumColumns = 32, kSumGroups = 8;
template <class T> __global__ void sum_rows_kernel(ColumnSum first, ColumnSum second, int64_t D) {
  __shared__ double group[kSumGroups][kSumColumns];
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  const float* partial = blockIdx.y ? second.partial : first.partial;
  const int64_t rows = blockIdx.y ? second.rows : first.rows;
  double s = 0;
  if (c < D)
    for (int64_t row = threadIdx.y; row < rows; row += kSumGroups) s += static_cast<double>(partial[row * D + c]);
  group[threadIdx.y][threadIdx.x] = s;
  __syncthreads();
  if (threadIdx.y || c >= D) return;
  for (int i = 1; i < kSumGroups; i++) s += group[i][threadIdx.x];
  static_cast<T*>(blockIdx.y ? second.out : first.out)[c] = static_cast<T>(static_cast<float>(s));
}
}  // namespace sail::cuda
