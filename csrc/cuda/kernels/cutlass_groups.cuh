// What CUTLASS's grouped GEMM is told of each expert. The device alone knows how many rows one has, so a kernel writes it.
// Neither CUTLASS nor torch is needed here: Shape {m, n, k} and Stride {elements between rows, 1, 0} are its types, or a
// test's (tests/cuda_emulation/cutlass_groups.cpp).
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "grouped_gemm.h"

namespace sail::cuda {
// Weights contiguous along k, rows in order, nothing fused, and all that TMA asks: rows on 16 bytes, none over another.
inline bool cutlass_takes(const RowsProblem& p, const StoreRows& out) {
  const auto rows = [](const void* data, int64_t stride, int64_t width) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0 && width % 8 == 0 && stride >= width;
  };
  const bool plain = p.layout == Layout::nk && !p.a.index && !p.b.second && !out.bias && !out.weight;
  return plain && rows(p.a.data, p.a.stride, p.K) && rows(p.b.first, p.b.row_stride, p.K) &&
         p.b.expert_stride % 8 == 0 && rows(out.out, out.out_stride, p.N) && out.out_stride == p.N;
}

// Arrays of E, in device memory.
template <class T, class Shape, class Stride> struct Groups {
  Shape* shape;
  const T **a, **b;
  T** d;
  Stride *a_stride, *b_stride, *d_stride;

  // Lays the arrays out from `at` (null: only counts); returns the bytes.
  int64_t place(char* at, int64_t E) {
    int64_t used = 0;
    const auto next = [&](auto*& p) {
      p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(at + used);
      used += (E * static_cast<int64_t>(sizeof *p) + 255) / 256 * 256;
    };
    next(shape), next(a), next(b), next(d), next(a_stride), next(b_stride), next(d_stride);
    return used;
  }
};

// A thread an expert.
template <class T, class Shape, class Stride>
__global__ void describe_groups_kernel(RowsProblem p, StoreRows out, Groups<T, Shape, Stride> g) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e >= p.E) return;
  const int64_t begin = p.offsets[e];
  g.shape[e] = Shape{static_cast<int>(p.offsets[e + 1] - begin), static_cast<int>(p.N), static_cast<int>(p.K)};
  g.a[e] = static_cast<const T*>(p.a.data) + begin * p.a.stride;
  g.b[e] = static_cast<const T*>(p.b.first) + e * p.b.expert_stride;
  g.d[e] = static_cast<T*>(out.out) + begin * out.out_stride;
  g.a_stride[e] = Stride{p.a.stride, {}, {}};
  g.b_stride[e] = Stride{p.b.row_stride, {}, {}};
  g.d_stride[e] = Stride{out.out_stride, {}, {}};
}

// Rows [*first, rows) of `row_vectors` times 16 bytes, any grid.
inline __global__ void zero_tail_kernel(uint4* out, const int32_t* first, int64_t rows, int64_t row_vectors) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x, end = rows * row_vectors;
  for (int64_t i = *first * row_vectors + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < end;
       i += step)
    out[i] = uint4{};
}
}  // namespace sail::cuda
