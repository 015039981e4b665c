// What a tensor map of the copy engine describes, as plain numbers: a matrix or one for every expert, or the rows of all
// heads, and the box of it that one copy brings to shared memory. 64 elements, 128 swizzled bytes, are a box's rows.
#pragma once
#include "grouped_gemm.h"

namespace sail::cuda {
constexpr int kBoxElements = 64;

struct TensorBox {
  const void* data = nullptr;
  int dims = 3;
  uint64_t size[4] = {};    // elements; the innermost dimension first
  uint64_t stride[3] = {};  // bytes, of all dimensions but the innermost
  uint32_t box[4] = {};     // elements

  // Whether cuTensorMapEncodeTiled takes it.
  SAIL_HD constexpr bool encodable(uint64_t address) const {
    for (int i = 0; i < dims; i++)
      if (size[i] < 1 || size[i] > uint64_t{1} << 32) return false;
    for (int i = 0; i < dims - 1; i++)
      if (stride[i] % 16 || stride[i] >= uint64_t{1} << 40) return false;
    return address % 16 == 0;
  }
  bool encodable() const { return data && encodable(reinterpret_cast<uintptr_t>(data)); }
};

// [matrices, rows, width] of 16-bit elements, `row_stride` and `matrix_stride` elements apart.
constexpr TensorBox tensor_box(const void* data, int64_t width, int64_t rows, int64_t row_stride, int64_t matrices,
                               int64_t matrix_stride, uint32_t box_rows) {
  TensorBox b;
  b.data = data;
  b.size[0] = static_cast<uint64_t>(width), b.size[1] = static_cast<uint64_t>(rows);
  b.size[2] = static_cast<uint64_t>(matrices);
  b.stride[0] = static_cast<uint64_t>(row_stride) * 2;
  // never used where there is one matrix, and checked all the same
  b.stride[1] = matrices > 1 ? static_cast<uint64_t>(matrix_stride) * 2 : b.stride[0];
  b.box[0] = kBoxElements, b.box[1] = box_rows, b.box[2] = 1;
  return b;
}
}  // namespace sail::cuda
