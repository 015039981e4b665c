// Rotary embedding, alone or after the RMSNorm of each head. A few neighboring threads take some heads of one token: each
// holds the same columns of both halves of a head, so that a rotation needs no other thread, and the cosines and sines
// of its columns, which serve all these heads.
#pragma once
#include <math.h>

#include "rows.cuh"

namespace sail::cuda {
constexpr int kRopeThreads = 256;             // of a block: `lanes` a head, blockDim.y items
constexpr int kHalf = 8;                      // elements of each half of a head in a thread: one or two 16-byte loads
constexpr int kRopeHeads = 4, kRopeBack = 2;  // heads of an item, all in flight together; backward reads two tensors
constexpr int kRopeDims = 3;                  // of the tokens, where strides differ; others are merged
constexpr int kRopeMost = 2 * kHalf * 32;     // elements of a head: a warp's

struct TokenStrides {
  int64_t along[kRopeDims];  // elements
};

// q or k; an item is some heads of a token, all of them `per_token` items
struct RopeSide {
  const void *x, *grad, *weight;  // [tokens, heads, A] twice; grad, weight: where they apply
  void* out;                      // [tokens, heads, A], contiguous
  float* dweight;                 // [blocks, A]; null: not needed
  TokenStrides x_token, grad_token;
  int64_t x_head, grad_head;  // elements
  int heads, per_token;
};

struct Rope {
  RopeSide q, k;          // blockIdx.y says which
  const void *cos, *sin;  // [..., width], of `table` elements; with positions: [rows, width]
  const void* positions;  // null: none
  TokenStrides cos_token, sin_token, position_token;
  int64_t cos_row, sin_row, rows, items_of_block;
  int size[kRopeDims];  // tokens
  int64_t tokens;
  int A, width;  // width: A, or A / 2 where the halves share a row
  Scalar table;
  bool wide_positions, transpose;
  float eps;
};

struct TokenPlace {
  unsigned at[kRopeDims];
  __device__ TokenPlace(const Rope& a, unsigned token) {
#pragma unroll
    for (int i = kRopeDims - 1; i > 0; i--) {
      at[i] = a.size[i] == 1 ? 0 : token % a.size[i];
      if (a.size[i] > 1) token /= a.size[i];
    }
    at[0] = token;
  }
  __device__ int64_t offset(const TokenStrides& s) const {
    int64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kRopeDims; i++) sum += at[i] * s.along[i];
    return sum;
  }
};

template <int N> struct HalfHead {
  float v[kHalf / N][N];
};

// Calls f(i, c) for this thread's columns c to c + N of a half.
template <int N, class F> __device__ void for_half(int half, F f) {
#pragma unroll
  for (int i = 0; i < kHalf / N; i++) {
    const int c = (i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * N;
    if (c < half) f(i, c);
  }
}

// N neighbors of a table, at most 16 bytes in an access
template <class T, int N> __device__ void load_pieces(const void* table, int64_t at, float (&out)[N]) {
  constexpr int kPiece = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
#pragma unroll
  for (int j = 0; j < N; j += kPiece) {
    float piece[kPiece];
    load(static_cast<const T*>(table) + at + j, piece);
#pragma unroll
    for (int l = 0; l < kPiece; l++) out[j + l] = piece[l];
  }
}
template <int N> __device__ void load_table(const void* table, Scalar type, int64_t at, float (&out)[N]) {
  if (type == Scalar::f32) return load_pieces<float>(table, at, out);
  if (type == Scalar::bf16) return load_pieces<__nv_bfloat16>(table, at, out);
  load_pieces<__half>(table, at, out);
}

// Cosines and sines of this thread's columns of one token; NaN at a position out of range.
template <int N> struct Angles {
  HalfHead<N> cos_low, cos_high, sin_low, sin_high;

  __device__ void read(const Rope& a, const TokenPlace& place) {
    int64_t cos_at = place.offset(a.cos_token), sin_at = place.offset(a.sin_token);
    bool inside = true;
    if (a.positions) {
      const int64_t at = place.offset(a.position_token);
      const int64_t p = a.wide_positions ? static_cast<const int64_t*>(a.positions)[at]
                                         : static_cast<const int32_t*>(a.positions)[at];
      inside = p >= 0 && p < a.rows;
      cos_at = p * a.cos_row, sin_at = p * a.sin_row;
    }
    const int half = a.A / 2, high = a.width == a.A ? half : 0;
    for_half<N>(half, [&](int i, int c) {
      if (inside) {
        load_table(a.cos, a.table, cos_at + c, cos_low.v[i]), load_table(a.sin, a.table, sin_at + c, sin_low.v[i]);
        load_table(a.cos, a.table, cos_at + high + c, cos_high.v[i]);
        load_table(a.sin, a.table, sin_at + high + c, sin_high.v[i]);
        return;
      }
#pragma unroll
      for (int j = 0; j < N; j++) cos_low.v[i][j] = cos_high.v[i][j] = sin_low.v[i][j] = sin_high.v[i][j] = NAN;
    });
  }
  __device__ void rotate(int i, int j, float& low, float& high) const {
    const float l = low, h = high;
    low = l * cos_low.v[i][j] - h * sin_low.v[i][j], high = h * cos_high.v[i][j] + l * sin_high.v[i][j];
  }
  __device__ void rotate_back(int i, int j, float& low, float& high) const {
    const float l = low, h = high;
    low = l * cos_low.v[i][j] + h * sin_high.v[i][j], high = h * cos_high.v[i][j] - l * sin_low.v[i][j];
  }
};

// One head as it lay in memory.
template <class T, int N> struct Head {
  Vec<T, N> low[kHalf / N], high[kHalf / N];

  __device__ void read(const T* p, int half) {
    for_half<N>(half, [&](int i, int c) { low[i] = load_vector<N>(p + c), high[i] = load_vector<N>(p + half + c); });
  }
  __device__ void get(int i, float (&l)[N], float (&h)[N]) const { widen(low[i], l), widen(high[i], h); }
};

// y = R(x), or R^T(x) with `transpose`; with kNorm R(x r weight), r = 1 / sqrt(mean(x^2) + eps)
template <class T, int N, bool kNorm> __global__ void __launch_bounds__(kRopeThreads) rope_kernel(Rope a) {
  const RopeSide s = blockIdx.y ? a.k : a.q;
  const int heads = s.heads, per_token = s.per_token;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = item < a.tokens * per_token;
  const unsigned token = live ? static_cast<unsigned>(item / per_token) : 0;
  const int first = live ? static_cast<int>(item % per_token) * kRopeHeads : heads, half = a.A / 2;
  const TokenPlace place(a, token);
  const T* x = static_cast<const T*>(s.x) + place.offset(s.x_token);
  T* out = static_cast<T*>(s.out) + static_cast<int64_t>(token) * heads * a.A;
  Angles<N> angles;
  Head<T, N> head[kRopeHeads];
#pragma unroll
  for (int h = 0; h < kRopeHeads; h++)
    if (first + h < heads) head[h].read(x + (first + h) * s.x_head, half);
  if (live) angles.read(a, place);
#pragma unroll
  for (int h = 0; h < kRopeHeads; h++) {
    const int width = first + h < heads ? half : 0;
    float squares[1] = {}, r = 1.f;
    if constexpr (kNorm) {
      for_half<N>(width, [&](int i, int) {
        float low[N], high[N];
        head[h].get(i, low, high);
#pragma unroll
        for (int j = 0; j < N; j++) squares[0] = fmaf(low[j], low[j], fmaf(high[j], high[j], squares[0]));
      });
      int turn = 0;
      row_sum(squares, turn);
      r = inverse_root(squares[0], a.A, a.eps);
    }
    for_half<N>(width, [&](int i, int c) {
      float low[N], high[N];
      head[h].get(i, low, high);
      if constexpr (kNorm) {
        float w_low[N], w_high[N];
        const T* weight = static_cast<const T*>(s.weight);
        load(weight + c, w_low), load(weight + half + c, w_high);
#pragma unroll
        for (int j = 0; j < N; j++) low[j] *= r * w_low[j], high[j] *= r * w_high[j];
      }
#pragma unroll
      for (int j = 0; j < N; j++)
        a.transpose ? angles.rotate_back(i, j, low[j], high[j]) : angles.rotate(i, j, low[j], high[j]);
      T* y = out + static_cast<int64_t>(first + h) * a.A;
      store(y + c, low), store(y + half + c, high);
    });
  }
}

// With n = R^T(grad): dx = r (w n - x r^2 mean(w n x)), dweight = sum over tokens and heads of n x r
template <class T, int N> __global__ void __launch_bounds__(kRopeThreads) qk_norm_rope_backward_kernel(Rope a) {
  const RopeSide s = blockIdx.y ? a.k : a.q;
  const int heads = s.heads, per_token = s.per_token, half = a.A / 2;
  const int64_t items = a.tokens * per_token, begin = blockIdx.x * a.items_of_block;
  if (begin >= items) return;  // a whole block
  const int64_t end = items < begin + a.items_of_block ? items : begin + a.items_of_block;
  const T* weight = static_cast<const T*>(s.weight);
  HalfHead<N> dw_low = {}, dw_high = {};
  for (int64_t next = begin; next < end; next += blockDim.y) {
    const bool live = next + threadIdx.y < end;
    const int64_t item = live ? next + threadIdx.y : begin;
    const unsigned token = static_cast<unsigned>(item / per_token);
    const int first = live ? static_cast<int>(item % per_token) * kRopeBack : heads;
    const TokenPlace place(a, token);
    const T* x = static_cast<const T*>(s.x) + place.offset(s.x_token);
    const T* grad = static_cast<const T*>(s.grad) + place.offset(s.grad_token);
    T* out = static_cast<T*>(s.out) + static_cast<int64_t>(token) * heads * a.A;
    Head<T, N> x_head[kRopeBack], g_head[kRopeBack];
#pragma unroll
    for (int h = 0; h < kRopeBack; h++) {
      if (first + h >= heads) continue;
      x_head[h].read(x + (first + h) * s.x_head, half), g_head[h].read(grad + (first + h) * s.grad_head, half);
    }
    Angles<N> angles;
    if (live) angles.read(a, place);
#pragma unroll
    for (int h = 0; h < kRopeBack; h++) {
      const int width = first + h < heads ? half : 0;
      float sums[2] = {};  // of x^2, of w n x
      for_half<N>(width, [&](int i, int c) {
        float x_low[N], x_high[N], n_low[N], n_high[N], w_low[N], w_high[N];
        x_head[h].get(i, x_low, x_high), g_head[h].get(i, n_low, n_high);
        load(weight + c, w_low), load(weight + half + c, w_high);
#pragma unroll
        for (int j = 0; j < N; j++) {
          angles.rotate_back(i, j, n_low[j], n_high[j]);
          sums[0] = fmaf(x_low[j], x_low[j], fmaf(x_high[j], x_high[j], sums[0]));
          sums[1] = fmaf(w_low[j] * n_low[j], x_low[j], fmaf(w_high[j] * n_high[j], x_high[j], sums[1]));
        }
      });
      int turn = 0;
      row_sum(sums, turn);
      const float r = inverse_root(sums[0], a.A, a.eps), slope = r * r * (sums[1] / static_cast<float>(a.A));
      for_half<N>(width, [&](int i, int c) {
        float x_low[N], x_high[N], n_low[N], n_high[N], w_low[N], w_high[N];
        x_head[h].get(i, x_low, x_high), g_head[h].get(i, n_low, n_high);
        load(weight + c, w_low), load(weight + half + c, w_high);
#pragma unroll
        for (int j = 0; j < N; j++) {
          angles.rotate_back(i, j, n_low[j], n_high[j]);
          dw_low.v[i][j] = fmaf(n_low[j], x_low[j] * r, dw_low.v[i][j]);
          dw_high.v[i][j] = fmaf(n_high[j], x_high[j] * r, dw_high.v[i][j]);
          x_low[j] = fmaf(-x_low[j], slope, w_low[j] * n_low[j]) * r;
          x_high[j] = fmaf(-x_high[j], slope, w_high[j] * n_high[j]) * r;
        }
        T* dx = out + static_cast<int64_t>(first + h) * a.A;
        store(dx + c, x_low), store(dx + half + c, x_high);
      });
    }
  }
  if (!s.dweight) return;
  float* dweight = s.dweight + blockIdx.x * static_cast<int64_t>(a.A);
  const auto columns = [&](auto f) { for_half<N>(half, [&](int i, int c) { f(i, static_cast<int64_t>(c)); }); };
  sum_slots(dw_low.v, dweight, columns);
  sum_slots(dw_high.v, dweight + half, columns);
}
}  // namespace sail::cuda
