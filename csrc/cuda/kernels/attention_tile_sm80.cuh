// What the attention kernels for mma.sync share: which rows a block has, tiles of rows in shared memory, and the two
// products of everything here.
//   add_scores    C[m, n] += sum_d A[m, d] B[n, d]    both in shared memory, rows of d
//   add_product   C[m, d] += sum_n P[m, n] B[n, d]    P in the registers that add_scores left it in
// The accumulators of mma hold what its first operand wants, so that probabilities never leave their registers.
#pragma once
#include "attention_rows.cuh"
#include "attention_softmax.cuh"

namespace sail::cuda::sm80 {
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

}  // namespace sail::cuda::sm80
