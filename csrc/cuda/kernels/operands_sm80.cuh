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

__device__ __forceinline__ int chunk_elements(int left) { return left >= 8 ? 8 : left > 0 ? left : 0; }

// What the threads of a block have of a tile: chunk threadIdx.x % kChunks of every kStep-th row from row() on.
template <class Tile, int kThreads> struct Share {
  static constexpr int kStep = kThreads / Tile::kChunks, kCount = (Tile::kRows + kStep - 1) / kStep;
  static_assert(kThreads % Tile::kChunks == 0);
  static __device__ __forceinline__ int chunk() { return static_cast<int>(threadIdx.x) % Tile::kChunks; }
  static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / Tile::kChunks; }
  static __device__ __forceinline__ bool has(int i) {
    return Tile::kRows % kStep == 0 || row() + i * kStep < Tile::kRows;
  }
  static __device__ __forceinline__ uint32_t offset(int i) { return Tile::offset(row() + i * kStep, chunk()); }
};

template <class T, class Tile, int kThreads, bool kAligned> class FixedRows {
  using Mine = Share<Tile, kThreads>;

 public:
  // source(i): the start of row i of the tile, null for a row of zeros; `any`: an address to name where nothing is read
  template <class Source> __device__ __forceinline__ void start(int width, const T* any, Source source) {
    left_ = width - Mine::chunk() * 8;
    valid_ = 0;
#pragma unroll
    for (int i = 0; i < Mine::kCount; i++) {
      const T* row = Mine::has(i) ? source(Mine::row() + i * Mine::kStep) : nullptr;
      valid_ |= (row != nullptr) << i;
      row_[i] = row ? row + Mine::chunk() * 8 : any;
    }
  }
  // Elements k .. of all rows
  __device__ __forceinline__ void load(char* tile, int k) {
    const int elements = chunk_elements(left_ - k);
#pragma unroll
    for (int i = 0; i < Mine::kCount; i++) {
      if (!Mine::has(i)) continue;
      const int wanted = valid_ >> i & 1 ? elements : 0;
      copy_chunk<T, kAligned>(tile, Mine::offset(i), wanted ? row_[i] + k : row_[i], wanted);
    }
  }

 private:
  const T* row_[Mine::kCount];
  int left_;  // elements from this thread's chunk on
  unsigned valid_;
};

// Rows k of an expert's weights, in one part or two. A thread starts at one element of row `row` and asks for rows
// further on by k + i.
template <class T> class WeightRows {
 public:
  __device__ __forceinline__ WeightRows(const T* first, const T* second, int64_t stride, int64_t split)
      : from_(first), stride_(stride), gap_(second ? second - split * stride - first : 0), split_(split) {}
  __device__ __forceinline__ void start(int row, int, int column) { row_ = row, from_ += row * stride_ + column; }
  __device__ __forceinline__ const T* any() const { return from_; }
  __device__ __forceinline__ const T* at(int k, int i, int) const {
    return from_ + (k + i) * stride_ + (k + row_ + i < split_ ? 0 : gap_);
  }
  __device__ __forceinline__ void look_ahead(int) {}

 private:
  const T* from_;
  int64_t stride_, gap_, split_;  // gap: what leads from the first part's rows on to the second's
  int row_ = 0;
};

// Rows begin + k, or what the index says: it is read a step ahead, as the copy would wait for it.
template <class T, int kCount, int kStep> class IndexedRows {
 public:
  __device__ __forceinline__ IndexedRows(const Rows& of, int64_t begin)
      : from_(static_cast<const T*>(of.data)), stride_(of.stride), index_(of.index), begin_(begin) {}
  __device__ __forceinline__ void start(int row, int rows, int column) {
    rows_ = rows - row, from_ += column;
    if (index_)
      index_ += begin_ + row;
    else
      from_ += (begin_ + row) * stride_;
    look_ahead(0);
  }
  __device__ __forceinline__ const T* any() const { return from_; }
  __device__ __forceinline__ const T* at(int k, int i, int which) const {
    return from_ + (index_ ? next_[which] : k + i) * stride_;
  }
  __device__ __forceinline__ void look_ahead(int k) {
    if (!index_) return;
#pragma unroll
    for (int i = 0; i < kCount; i++)
      if (k < rows_ - i * kStep) next_[i] = index_[k + i * kStep];
  }

 private:
  const T* from_;
  int64_t stride_;
  const int32_t* index_;
  int64_t begin_;
  int rows_ = 0;
  int32_t next_[kCount];
};
template <class T, class Tile, int kThreads, bool kAligned, class Source> class MovingRows {
  using Mine = Share<Tile, kThreads>;

 public:
  // Elements `first` .. of `width` of the rows 0 .. rows
  __device__ __forceinline__ MovingRows(const Source& source, int rows, int first, int width)
      : source_(source), rows_(rows - Mine::row()) {
    const int column = first + Mine::chunk() * 8;
    elements_ = chunk_elements(width - column);
    source_.start(Mine::row(), rows, column);
  }
  // Rows k ..; k rises by the tile's rows from call to call
  __device__ __forceinline__ void load(char* tile, int k) {
#pragma unroll
    for (int i = 0; i < Mine::kCount; i++) {
      if (!Mine::has(i)) continue;
      const int wanted = k < rows_ - i * Mine::kStep ? elements_ : 0;
      const T* from = wanted ? source_.at(k, i * Mine::kStep, i) : source_.any();
      copy_chunk<T, kAligned>(tile, Mine::offset(i), from, wanted);
    }
    if (k < rows_ - Tile::kRows) source_.look_ahead(k + Tile::kRows);
  }

 private:
  Source source_;
  int rows_, elements_;  // rows from this thread's first on
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
