// RMSNorm and LayerNorm forward and backward. A row of up to 8192 elements (2048 where vectors do not fit) is read once
// and stays in registers; a longer one is read again for every pass and found in L1 or L2.
//
// The gradients of weight and bias sum over rows without atomics: a block walks its rows, each thread adds its own
// columns in registers (long rows: in the block's row of `partial`), the slots are added in their order, and
// sum_rows_kernel adds the blocks' rows in theirs. Shape and card decide these orders, so every run gives the same bits.
#pragma once
#include "rows.cuh"

namespace sail::cuda {
struct NormForward {
  const void *x, *residual, *weight, *bias;  // [rows, D] twice, [D] twice; null residual or bias: none
  void *y, *sum;                             // [rows, D], contiguous; sum = x + residual, rounded
  int64_t rows, D, x_stride, residual_stride;
  float eps;
};

struct NormBackward {
  const void *grad, *grad_sum, *x, *weight;  // grad_sum [rows, D] is added to dx; null: none
  void* dx;                                  // [rows, D], contiguous; null: not needed
  float *dweight, *dbias;                    // [blocks, D], the blocks' sums; null: not needed
  int64_t rows, D, grad_stride, grad_sum_stride, x_stride, rows_of_block;
  float eps;
};

// The mean of a row for LayerNorm, 0 for RMSNorm. In fp32 it is off by its own rounding, and a whole row with it: what is
// left, mean(x - mean), comes with the next sums.
template <bool kLayer, int N, bool kKept, class T>
__device__ float row_mean(const Row<T, N, kKept>& x, int64_t width, int64_t D, int& turn) {
  if constexpr (!kLayer) return 0.f;
  float s[1] = {};
  for_columns<N, kKept>(width, [&](int i, int64_t c) {
    float v[N];
    x.get(i, c, v);
#pragma unroll
    for (int j = 0; j < N; j++) s[0] += v[j];
  });
  row_sum(s, turn);
  return s[0] / static_cast<float>(D);
}

// y = (v - mean) / sqrt(mean((v - mean)^2) + eps) * weight + bias, with v = x or x + residual; RMSNorm has no mean
template <class T, int N, bool kKept, bool kLayer>
__global__ void __launch_bounds__(kRowThreads) norm_kernel(NormForward a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t width = row < a.rows ? a.D : 0;  // a slot past the last row only takes part in the sums
  Row<T, N, kKept> x;
  x.read(static_cast<const T*>(a.x) + row * a.x_stride, width);
  if (a.residual) {
    const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
    T* sum = static_cast<T*>(a.sum) + row * a.D;
    for_columns<N, kKept>(width, [&](int i, int64_t c) {
      float v[N], r[N];
      x.get(i, c, v), widen(load_vector<N>(residual + c), r);
#pragma unroll
      for (int j = 0; j < N; j++) v[j] += r[j];
      x.v[i] = narrow<T>(v);
      store_vector(sum + c, x.v[i]);
    });
    x.p = sum;
  }
  int turn = 0;
  const float mean = row_mean<kLayer>(x, width, a.D, turn);
  float sums[kLayer ? 2 : 1] = {};  // of (v - mean)^2, of v - mean
  for_columns<N, kKept>(width, [&](int i, int64_t c) {
    float v[N];
    x.get(i, c, v);
#pragma unroll
    for (int j = 0; j < N; j++) {
      const float centered = v[j] - mean;
      sums[0] = fmaf(centered, centered, sums[0]);
      if constexpr (kLayer) sums[1] += centered;
    }
  });
  row_sum(sums, turn);
  const float rest = kLayer ? sums[kLayer ? 1 : 0] / static_cast<float>(a.D) : 0.f;
  const float r = inverse_root(kLayer ? fmaf(-rest, sums[kLayer ? 1 : 0], sums[0]) : sums[0], a.D, a.eps);
  T* y = static_cast<T*>(a.y) + row * a.D;
  for_columns<N, kKept>(width, [&](int i, int64_t c) {
    float v[N], w[N], b[N] = {};
    x.get(i, c, v), load(static_cast<const T*>(a.weight) + c, w);
    if (a.bias) load(static_cast<const T*>(a.bias) + c, b);
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = kLayer ? fmaf((v[j] - mean - rest) * r, w[j], b[j]) : v[j] * r * w[j];
    store(y + c, v);
  });
}

// With h = (x - mean) r, r = 1 / sqrt(mean((x - mean)^2) + eps):
//   dx = r (w g - mean(w g) - h mean(w g h)) + grad_sum,  dweight = sum over rows of g h,  dbias = sum over rows of g
// RMSNorm has no mean and no mean(w g).
template <class T, int N, bool kKept, bool kLayer>
__global__ void __launch_bounds__(kRowThreads) norm_backward_kernel(NormBackward a) {
  constexpr int kVectors = kKept ? kRowElements<N> / N : 1;
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * a.rows_of_block;
  const int64_t end = a.rows < begin + a.rows_of_block ? a.rows : begin + a.rows_of_block;
  float* block_dweight = a.dweight + blockIdx.x * a.D;
  float* block_dbias = a.dbias + blockIdx.x * a.D;
  float dw[kVectors][N] = {}, db[kVectors][N] = {};
  const float D = static_cast<float>(a.D);
  int turn = 0;

  for (int64_t first = begin; first < end; first += blockDim.y) {
    const int64_t row = first + threadIdx.y, width = row < end ? a.D : 0;
    Row<T, N, kKept> g_row, x_row;
    g_row.read(static_cast<const T*>(a.grad) + row * a.grad_stride, width);
    x_row.read(static_cast<const T*>(a.x) + row * a.x_stride, width);
    const float mean = row_mean<kLayer>(x_row, width, a.D, turn);
    float sums[kLayer ? 4 : 2] = {};  // of (x - mean)^2, of w g (x - mean), of w g, of x - mean
    for_columns<N, kKept>(width, [&](int i, int64_t c) {
      float g[N], x[N], w[N];
      g_row.get(i, c, g), x_row.get(i, c, x), load(weight + c, w);
#pragma unroll
      for (int j = 0; j < N; j++) {
        const float centered = x[j] - mean, wg = w[j] * g[j];
        sums[0] = fmaf(centered, centered, sums[0]), sums[1] = fmaf(wg, centered, sums[1]);
        if constexpr (kLayer) sums[2] += wg, sums[3] += centered;
      }
    });
    row_sum(sums, turn);
    float rest = 0.f, wg_mean = 0.f;
    if constexpr (kLayer) {
      rest = sums[3] / D, wg_mean = sums[2] / D;
      sums[0] = fmaf(-rest, sums[3], sums[0]), sums[1] = fmaf(-rest, sums[2], sums[1]);
    }
    const float r = inverse_root(sums[0], a.D, a.eps), slope = r * r * (sums[1] / D);
    for_columns<N, kKept>(width, [&](int i, int64_t c) {
      float g[N], x[N];
      g_row.get(i, c, g), x_row.get(i, c, x);
#pragma unroll
      for (int j = 0; j < N; j++) {
        x[j] = x[j] - mean - rest;
        if constexpr (kKept) {
          dw[i][j] = fmaf(g[j], x[j] * r, dw[i][j]), db[i][j] += g[j];
        } else {  // each thread only its own columns, so no barrier
          const bool again = row > begin;
          if (a.dweight) block_dweight[c + j] = fmaf(g[j], x[j] * r, again ? block_dweight[c + j] : 0.f);
          if (a.dbias) block_dbias[c + j] = g[j] + (again ? block_dbias[c + j] : 0.f);
        }
      }
      if (!a.dx) return;
      float w[N], extra[N] = {};
      load(weight + c, w);
      if (a.grad_sum) load(static_cast<const T*>(a.grad_sum) + row * a.grad_sum_stride + c, extra);
#pragma unroll
      for (int j = 0; j < N; j++) x[j] = fmaf(fmaf(-x[j], slope, fmaf(w[j], g[j], -wg_mean)), r, extra[j]);
      store(static_cast<T*>(a.dx) + row * a.D + c, x);
    });
  }
  if constexpr (kKept) {
    const auto columns = [&](auto f) { for_columns<N, true>(a.D, f); };
    if (a.dweight) sum_slots(dw, block_dweight, columns);
    if (a.dbias) sum_slots(db, block_dbias, columns);
  }
}
}  // namespace sail::cuda
