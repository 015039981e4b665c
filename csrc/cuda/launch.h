// What every CUDA host function needs around launcher.h: torch's stream, checks, dtype and alignment as types.
#pragma once
#include <stdlib.h>

#include "../torch/checks.h"
#include "../torch/stable_abi_cuda.h"
#include "kernels/elements.cuh"
#include "launcher.h"

namespace sail::cuda {
// torch's stream on the tensor's card. Throws as card_of does where the library has no code for it: every operator comes
// by here, so that none ends in CUDA's "no kernel image".
Stream current_stream(const Check& c, const Tensor& t);

// SAIL_OPS_CHECK=1: values are checked too, which waits for the device.
inline bool check_values() {
  static const bool wanted = [] {
    const char* check = getenv("SAIL_OPS_CHECK");
    return check && !strcmp(check, "1");
  }();
  return wanted;
}

// 16 bytes a thread where every row of every tensor starts on 16 bytes
inline bool aligned(int64_t element, std::initializer_list<const void*> pointers,
                    std::initializer_list<int64_t> strides) {
  uint64_t bits = 0;
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  for (int64_t s : strides) bits |= static_cast<uint64_t>(s * element);
  return bits % 16 == 0;
}

// Calls f with (T{}, width of a vector): the one place where dtype and alignment become types.
template <int N> struct Width {
  static constexpr int value = N;
};
template <class F> void dispatch(DType dtype, bool vectors, F f) {
  switch (dtype) {
    case DType::f32: return vectors ? f(float{}, Width<4>{}) : f(float{}, Width<1>{});
    case DType::bf16: return vectors ? f(__nv_bfloat16{}, Width<8>{}) : f(__nv_bfloat16{}, Width<1>{});
    case DType::f16: return vectors ? f(__half{}, Width<8>{}) : f(__half{}, Width<1>{});
  }
}

// Elements between the rows of [..., D]: the last dimension is contiguous, the others are walked by one stride.
inline int64_t row_stride(const Check& c, const char* arg, const Tensor& t) {
  c.rows(arg, t);
  int64_t stride = 0, rows = 1;
  bool even = true;
  for (int64_t i = t.dim() - 2; i >= 0; i--) {
    if (t.size(i) == 1) continue;
    if (rows == 1) stride = t.stride(i);
    even = even && t.stride(i) == stride * rows;
    rows *= t.size(i);
  }
  c.that(even || !rows, arg, "rows of uneven distance, shape " + shape_text(t), "a contiguous tensor");
  return stride;
}
}  // namespace sail::cuda
