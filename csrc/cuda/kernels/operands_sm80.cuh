// How an operand of grouped_gemm_sm80.cuh comes into shared memory, and from there into the fragments of mma.
//
// A SharedTile is rows of contiguous elements in chunks of 16 bytes. Chunks are swizzled within 128 bytes, so that the
// eight rows that one 8 x 8 matrix of ldmatrix reads lie in different banks, as do the chunks that eight threads write.
// An operand that is contiguous along k has its own rows as rows of the tile (FixedRows: the same ones in every step);
// one that is contiguous along m or n has rows of k (MovingRows: others in every step, gathered by an index or not).
#pragma once
#include "elements.cuh"
#include "gemm_config.h"
#include "ptx.cuh"

namespace sail::cuda::sm80 {
template <int kRowsOf, int kElements> struct SharedTile {
  static constexpr int kRows = kRowsOf, kChunks = kElements / 8, kRowBytes = kElements * 2, kBytes = kRows * kRowBytes;
  static constexpr int kTurnRows = kChunks < 8 ? 8 / kChunks : 1;  // rows within 128 bytes
  SAIL_HD static constexpr uint32_t offset(int row, int chunk) {
    const int turn = row / kTurnRows % (kChunks < 8 ? kChunks : 8);
    return static_cast<uint32_t>(row * kRowBytes + (chunk ^ turn) * 16);
  }
};

// Copies `elements` of 8 and zeros for the rest. Not aligned: element by element, through registers.
template <class T, bool kAligned>
__device__ __forceinline__ void copy_chunk(char* shared, uint32_t to, const T* from, int elements) {
  if constexpr (kAligned) {
    ptx::cp_async(ptx::shared_address(shared) + to, from, elements * 2);
  } else {
    Vec<T, 8> chunk;
#pragma unroll
    for (int i = 0; i < 8; i++) chunk.v[i] = i < elements ? from[i] : static_cast<T>(0.f);
    *reinterpret_cast<Vec<T, 8>*>(shared + to) = chunk;
  }
}

__device__ __forceinline__ int chunk_elements(int64_t left) {
  return left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
}

// What the threads of a block have of a tile: chunk threadIdx.x % kChunks of every kStep-th row.
template <class Tile, int kThreads> struct Share {
  static constexpr int kStep = kThreads / Tile::kChunks, kCount = (Tile::kRows + kStep - 1) / kStep;
  static_assert(kThreads % Tile::kChunks == 0);
  static __device__ __forceinline__ int chunk() { return static_cast<int>(threadIdx.x) % Tile::kChunks; }
  static __device__ __forceinline__ int row(int i) { return static_cast<int>(threadIdx.x) / Tile::kChunks + i * kStep; }
  static __device__ __forceinline__ bool has(int i) { return Tile::kRows % kStep == 0 || row(i) < Tile::kRows; }
};

template <class T, class Tile, int kThreads, bool kAligned> class FixedRows {
  using Mine = Share<Tile, kThreads>;

 public:
  // source(i): the start of row i of the tile, null for a row of zeros; `any`: an address to name where nothing is read
  template <class Source> __device__ __forceinline__ void start(int64_t width, const T* any, Source source) {
    left_ = width - Mine::chunk() * 8;
    valid_ = 0;
#pragma unroll
    for (int i = 0; i < Mine::kCount; i++) {
      const T* row = Mine::has(i) ? source(Mine::row(i)) : nullptr;
      valid_ |= (row != nullptr) << i;
      row_[i] = row ? row + Mine::chunk() * 8 : any;
    }
  }
  // Elements k .. of all rows
  __device__ __forceinline__ void load(char* tile, int64_t k) {
    const int elements = chunk_elements(left_ - k);
#pragma unroll
    for (int i = 0; i < Mine::kCount; i++) {
      if (!Mine::has(i)) continue;
      const int wanted = valid_ >> i & 1 ? elements : 0;
      copy_chunk<T, kAligned>(tile, Tile::offset(Mine::row(i), Mine::chunk()), wanted ? row_[i] + k : row_[i], wanted);
    }
  }

 private:
  const T* row_[Mine::kCount];
  int64_t left_;  // elements from this thread's chunk on
  unsigned valid_;
};

// Rows k of an expert's weights, in one part or two.
template <class T> struct WeightRows {
  const T *first, *second;  // of the expert
  int64_t stride, split;
  using Key = int64_t;
  static constexpr bool kAhead = false;
  __device__ __forceinline__ Key key(int64_t k) const { return k; }
  __device__ __forceinline__ const T* at(Key k) const {
    return k < split ? first + k * stride : second + (k - split) * stride;
  }
};

// Rows begin + k, or what the index says. The index is read a step ahead: the copy would wait for it.
template <class T> struct IndexedRows {
  const T* data;
  int64_t stride;
  const int32_t* index;
  int64_t begin;
  using Key = int32_t;
  static constexpr bool kAhead = true;
  __device__ __forceinline__ Key key(int64_t k) const {
    return index ? index[begin + k] : static_cast<int32_t>(begin + k);
  }
  __device__ __forceinline__ const T* at(Key row) const { return data + row * stride; }
};

template <class T, class Tile, int kThreads, bool kAligned, class Source> class MovingRows {
  using Mine = Share<Tile, kThreads>;

 public:
  // Elements `first` .. of `width` of the rows 0 .. rows
  __device__ __forceinline__ void start(const Source& source, int64_t rows, int64_t first, int64_t width) {
    source_ = source, rows_ = rows;
    column_ = first + Mine::chunk() * 8;
    elements_ = chunk_elements(width - column_);
    if constexpr (Source::kAhead) read_keys(0);
  }
  // Rows k ..; k rises by the tile's rows from call to call
  __device__ __forceinline__ void load(char* tile, int64_t k) {
#pragma unroll
    for (int i = 0; i < Mine::kCount; i++) {
      if (!Mine::has(i)) continue;
      const int64_t row = k + Mine::row(i);
      const int wanted = row < rows_ ? elements_ : 0;
      const T* from = source_.at(0);
      if (wanted) from = source_.at(Source::kAhead ? keys_[i] : source_.key(row)) + column_;
      copy_chunk<T, kAligned>(tile, Tile::offset(Mine::row(i), Mine::chunk()), from, wanted);
    }
    if constexpr (Source::kAhead) read_keys(k + Tile::kRows);
  }

 private:
  __device__ __forceinline__ void read_keys(int64_t k) {
#pragma unroll
    for (int i = 0; i < Mine::kCount; i++)
      if (k + Mine::row(i) < rows_) keys_[i] = source_.key(k + Mine::row(i));
  }

  Source source_;
  int64_t rows_, column_;
  int elements_;
  typename Source::Key keys_[Source::kAhead ? Mine::kCount : 1];
};

// Where a lane finds its row of the 16 x 16 blocks that one ldmatrix reads. Blocks follow each other along m or n by
// `block`, along k by `step`. kFirst: the operand is A; its matrices go m first, then k, those of B k first, then n.
template <class Tile, bool kTransposed, bool kFirst> class BlockReader {
 public:
  __device__ __forceinline__ explicit BlockReader(int first) {  // of m or n
    const int lane = static_cast<int>(threadIdx.x) % 32;
    // within the block: rows of the tile 0 .. 15, and the half of a row's 32 bytes
    const bool plain = kTransposed != kFirst;
    const int row = plain ? lane % 16 : lane / 16 * 8 + lane % 8, half = plain ? lane / 16 : lane / 8 % 2;
    at_ = kTransposed ? Tile::offset(row, first / 8 + half) : Tile::offset(first + row, half);
  }
  __device__ __forceinline__ void read(uint32_t (&r)[4], uint32_t tile, int block, int step) const {
    // a block's 32 bytes are an aligned pair of chunks, so its number and the swizzle meet in an exclusive or
    if constexpr (kTransposed)
      ptx::ldmatrix_transposed(r, tile + (at_ ^ static_cast<uint32_t>(block * 32)) + step * 16 * Tile::kRowBytes);
    else
      ptx::ldmatrix(r, tile + (at_ ^ static_cast<uint32_t>(step * 32)) + block * 16 * Tile::kRowBytes);
  }

 private:
  uint32_t at_;
};
}  // namespace sail::cuda::sm80
