// Operands in shared memory as wgmma reads them (PTX ISA 9.7.16.5.1.2, the canonical layouts with 128-byte swizzle), and
// how a warp group copies rows there itself where the copy engine cannot: gathered rows, and rows that end early.
//
// An operand lies in rows of 128 bytes, 64 elements; eight rows, 1024 bytes, are one pattern of the swizzle, which
// exchanges the 16-byte chunks of row i by i % 8.
//   along K   [M or N, 64 of K]: a row is a row of the operand
//   along MN  panels [64 of K, 64 of M or N]: a row is one k; the next 64 of M or N are the next panel
#pragma once
#include "ptx_sm90.cuh"

namespace sail::cuda {
constexpr int kTileK = 64, kRowBytes = 128, kPatternBytes = 8 * kRowBytes, kPanelBytes = kTileK * kRowBytes;

template <bool kAlongMN> struct Operand {
  // Bytes from k to k + 16, one wgmma further.
  static constexpr uint32_t kStepBytes = kAlongMN ? 16 * kRowBytes : 32;
  // Bytes from row 0 to row 64 of M or N.
  static constexpr uint32_t kRows64Bytes = kAlongMN ? kPanelBytes : 64 * kRowBytes;

  // Of the rows that start at this address. Along K, the leading offset is not used with a swizzle.
  static SAIL_HD constexpr uint64_t descriptor(uint32_t address) {
    constexpr uint64_t leading = kAlongMN ? kPanelBytes : 16, stride = kPatternBytes, swizzle_128 = 1;
    return (address & 0x3ffff) >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | swizzle_128 << 62;
  }
};

// Where 16 bytes come from; bytes < 16: the rest are zeros.
struct Chunk {
  const void* from;
  int bytes;
};

// Copies kRows rows of 128 bytes, eight threads to a row: source(i, column) is the chunk of row
// thread / 8 + i * kThreads / 8 at this element of the row.
template <int kRows, int kThreads, class Source>
__device__ __forceinline__ void copy_rows(uint32_t to, int thread, const Source& source) {
  constexpr int kStep = kThreads / 8;
  static_assert(kStep % 8 == 0 && kRows % kStep == 0, "the swizzle of a thread's rows is the same");
  const int row = thread / 8, chunk = thread % 8;
  to += row * kRowBytes + ((chunk ^ (row & 7)) << 4);
#pragma unroll 4  // more in flight would cost the producer registers that it does not have
  for (int i = 0; i < kRows / kStep; i++) {
    const Chunk c = source(i, chunk * 8);
    ptx::cp_async(to + i * kStep * kRowBytes, c.from, c.bytes);
  }
}

// Bytes of a chunk of which `elements` exist, at least none and at most all 8.
__device__ __forceinline__ int chunk_bytes(int elements) {
  return elements <= 0 ? 0 : elements < 8 ? elements * 2 : 16;
}
}  // namespace sail::cuda
