// What the attention kernels for mma.sync share: which rows a block has, tiles of rows in shared memory, and the two
// products of everything here.
//   add_scores    C[m, n] += sum_d A[m, d] B[n, d]    both in shared memory, rows of d
//   add_product   C[m, d] += sum_n P[m, n] B[n, d]    P in the registers that add_scores left it in
// The accumulators of mma hold what its first operand wants, so that probabilities never leave their registers.
#pragma once
#include "attention.h"
#include "epilogues.cuh"
#include "ptx.cuh"

namespace sail::cuda::sm80 {
constexpr float kLn2 = 0.6931471805599453f, kLog2E = 1.4426950408889634f;

// ---- sequences and blocks of rows
struct Sequence {
  int batch, q0, nq, k0, nk;  // tokens q0 .. q0 + nq attend to tokens k0 .. k0 + nk
  // the last key that query i sees is i + behind
  __device__ __forceinline__ int behind(bool causal) const { return causal ? nk - nq : 1 << 30; }
};

struct Span {
  int first, count;
};
__device__ __forceinline__ Span span(const int32_t* cu, int64_t i, int64_t total) {
  const int most = static_cast<int>(total), first = max(0, min(cu[i], most));
  return {first, max(first, min(cu[i + 1], most)) - first};
}

__device__ __forceinline__ Sequence sequence(const Attention& a, int64_t i) {
  if (!a.cu_q) return {static_cast<int>(i), 0, static_cast<int>(a.S), 0, static_cast<int>(a.L)};
  const Span q = span(a.cu_q, i, a.S), k = span(a.cu_k, i, a.L);
  return {0, q.first, q.count, k.first, k.count};
}

struct RowBlock {
  Sequence s;
  int head, first;  // first: row of the sequence
};

// Block `index` of all: heads are neighbors, as those of a group share keys. Every sequence has ceil(tokens / kRows)
// blocks of `heads`; with kLastFirst the last ones come first, as in a causal one they take longest. False: no block.
template <int kRows, bool kLastFirst>
__device__ __forceinline__ bool find_block(const Attention& a, const int32_t* cu, int64_t tokens, int64_t heads,
                                           RowBlock* out) {
  const auto heads32 = static_cast<uint32_t>(heads), rest = blockIdx.x / heads32;
  out->head = static_cast<int>(blockIdx.x % heads32);
  int blocks, block;
  if (!cu) {
    const auto B = static_cast<uint32_t>(a.B);
    blocks = static_cast<int>(ceil_div(tokens, kRows)), block = static_cast<int>(rest / B);
    out->s = sequence(a, rest % B);
  } else {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int before = 0;
    int64_t first = 0;
    while (true) {  // 32 sequences at a time, a lane each
      if (first >= a.B) return false;
      const int own = first + lane < a.B ? static_cast<int>(ceil_div(span(cu, first + lane, tokens).count, kRows)) : 0;
      int end = own;
#pragma unroll
      for (int o = 1; o < 32; o *= 2) {
        const int lower = __shfl_up_sync(~0u, end, o);
        if (lane >= o) end += lower;
      }
      const int total = __shfl_sync(~0u, end, 31), index = static_cast<int>(rest) - before;
      if (index < total) {
        const int owner = __ffs(__ballot_sync(~0u, index < end)) - 1;
        blocks = __shfl_sync(~0u, own, owner), block = index - __shfl_sync(~0u, end - own, owner);
        out->s = sequence(a, first + owner);
        break;
      }
      before += total, first += 32;
    }
  }
  out->first = (kLastFirst ? blocks - 1 - block : block) * kRows;
  return true;
}

// What a block works on, in shared memory: in registers it would take the place of a loop's operands.
template <class Work> __device__ __forceinline__ const Work& share(const Work& mine) {
  __shared__ Work work;
  if (threadIdx.x == 0) work = mine;
  __syncthreads();
  return work;
}

template <class T> __device__ __forceinline__ const T* row_of(const HeadRows& x, int64_t b, int64_t t, int64_t h) {
  return static_cast<const T*>(x.data) + b * x.batch + t * x.token + h * x.head;
}
// Of a contiguous tensor with `heads` heads
__device__ __forceinline__ int64_t flat_row(int64_t tokens, int64_t heads, int64_t D, int64_t b, int64_t t, int64_t h) {
  return ((b * tokens + t) * heads + h) * D;
}
__device__ __forceinline__ int64_t lse_at(const Attention& a, const Sequence& s, int i, int head) {
  return (int64_t{s.batch} * a.H + head) * a.S + s.q0 + i;
}

// ---- tiles: rows of kD elements in chunks of 16 bytes. The eight rows that a matrix of ldmatrix takes lie in different
// banks: a swizzle within 128 bytes, or where rows are no multiple of that, an odd number of chunks from row to row.
template <int kRowsOf, int kElements> struct HeadTile {
  static constexpr int kRows = kRowsOf, kChunks = kElements / 8;
  static constexpr bool kSwizzled = kChunks % 8 == 0;
  static constexpr int kPitch = (kSwizzled ? kChunks : kChunks | 1) * 16, kBytes = kRows * kPitch;
  SAIL_HD static constexpr uint32_t offset(int row, int chunk) {
    return static_cast<uint32_t>(row * kPitch + (kSwizzled ? chunk ^ row % 8 : chunk) * 16);
  }
};

// Starts the copies of source(0), source(1), ... into a tile; zeros for rows from `rows` on and elements from D on.
template <class T, class Tile, int kThreads, class Source>
__device__ __forceinline__ void load_tile(uint32_t tile, int rows, int D, Source source) {
  constexpr int kAcross = Tile::kChunks % 8 == 0 ? 8 : 4, kStep = kThreads / kAcross;
  const int across = static_cast<int>(threadIdx.x) % kAcross, down = static_cast<int>(threadIdx.x) / kAcross;
#pragma unroll
  for (int first = 0; first < Tile::kRows; first += kStep) {
    const int row = first + down;
    if (Tile::kRows % kStep && row >= Tile::kRows) continue;
    const T* from = source(row) + across * 8;
#pragma unroll
    for (int right = 0; right < Tile::kChunks; right += kAcross) {
      const bool there = row < rows && (across + right) * 8 < D;
      ptx::cp_async(tile + Tile::offset(row, across + right), from + right * 8, there ? 16 : 0);
    }
  }
}

// Where a lane finds its row of 16 x 16 blocks. kAcross: matrices go right before they go down (the second operand of
// add_scores), otherwise down first.
template <class Tile, bool kAcross> __device__ __forceinline__ uint32_t lane_offset() {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return kAcross ? Tile::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2) : Tile::offset(lane % 16, lane / 16);
}
// From there the block at `row`, a multiple of 16, and 16 * step elements. Swizzled tiles start on 256 bytes, so that the
// step's bits meet those of the swizzle alone.
template <class Tile> __device__ __forceinline__ uint32_t block_at(uint32_t from, int row, int step) {
  const auto right = static_cast<uint32_t>(step * 32);
  return (Tile::kSwizzled ? from ^ right : from + right) + row * Tile::kPitch;
}

template <int kF, int kColumns> using Fragments = float[kF][kColumns / 8][4];  // 16 kF rows of a warp

template <class T, class TileA, class TileB, int kF, int kN8>
__device__ __forceinline__ void add_scores(float (&c)[kF][kN8][4], uint32_t a_tile, uint32_t b_tile) {
  const uint32_t a_from = a_tile + lane_offset<TileA, false>(), b_from = b_tile + lane_offset<TileB, true>();
#pragma unroll
  for (int step = 0; step < TileA::kChunks / 2; step++) {
    uint32_t a[kF][4];
#pragma unroll
    for (int i = 0; i < kF; i++) ptx::ldmatrix(a[i], block_at<TileA>(a_from, 16 * i, step));
#pragma unroll
    for (int j = 0; j < kN8 / 2; j++) {
      uint32_t b[4];
      ptx::ldmatrix(b, block_at<TileB>(b_from, 16 * j, step));
#pragma unroll
      for (int i = 0; i < kF; i++) {
        ptx::mma<T>(c[i][2 * j], a[i], b[0], b[1]);
        ptx::mma<T>(c[i][2 * j + 1], a[i], b[2], b[3]);
      }
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
template <int kF, int kColumns> using Operand = uint32_t[kF][kColumns / 16][4];
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

template <class T, class Tile, int kF, int kN16, int kD8>
__device__ __forceinline__ void add_product(float (&c)[kF][kD8][4], const uint32_t (&a)[kF][kN16][4], uint32_t tile) {
  const uint32_t from_tile = tile + lane_offset<Tile, false>();
#pragma unroll
  for (int n = 0; n < kN16; n++)
#pragma unroll
    for (int j = 0; j < kD8 / 2; j++) {
      uint32_t b[4];
      ptx::ldmatrix_transposed(b, block_at<Tile>(from_tile, 16 * n, j));
#pragma unroll
      for (int i = 0; i < kF; i++) {
        ptx::mma<T>(c[i][2 * j], a[i][n], b[0], b[1]);
        ptx::mma<T>(c[i][2 * j + 1], a[i][n], b[2], b[3]);
      }
    }
}

// ---- what a lane has of a warp's fragments: rows lane / 4 + 8 * (2 i + half), columns 2 * (lane % 4) + 8 j and the next
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
template <int kN8> __device__ __forceinline__ void mask(float (&s)[kN8][4], int half, int last, float to) {
#pragma unroll
  for (int j = 0; j < kN8; j++)
#pragma unroll
    for (int e = 0; e < 2; e++)
      if (8 * j + e > last - lane_column()) s[j][2 * half + e] = to;
}

// Stores factor(i, half) * rows; to(i, half) is where row 16 i + 8 half + lane_row() goes, null: nowhere.
template <int kF, int kD8, class To, class Factor>
__device__ __forceinline__ void store_rows(const float (&c)[kF][kD8][4], int D, To to, Factor factor) {
#pragma unroll
  for (int i = 0; i < kF; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      auto* row = to(i, half);
      const float f = factor(i, half);
#pragma unroll
      for (int j = 0; j < kD8; j += 4) {
        float2 pairs[4];
        float v[8];
#pragma unroll
        for (int t = 0; t < 4; t++) pairs[t] = {c[i][j + t][half * 2] * f, c[i][j + t][half * 2 + 1] * f};
        turn_quad(pairs);
#pragma unroll
        for (int t = 0; t < 4; t++) v[2 * t] = pairs[t].x, v[2 * t + 1] = pairs[t].y;
        if (row) store_eight<true>(row, (j + static_cast<int>(threadIdx.x) % 4) * 8, D, v);
      }
    }
}
}  // namespace sail::cuda::sm80
