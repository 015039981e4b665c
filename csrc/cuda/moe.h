// The expert layer's passes on CUDA; moe.cu checks arguments and calls them. Nothing here waits for the device: the rows
// of each expert are known to it alone.
#pragma once
#include "../torch/moe.h"
#include "card.h"
#include "launch.h"

namespace sail::cuda {
// One op call on one card: whose it is, which memory its buffers are like, where it launches.
struct Call {
  const Check& c;
  const Tensor& like;
  Card card;
  Stream stream;

  // The last check: whatever else is wrong with a call is said first.
  Call(const Check& check, const Tensor& x)
      : c(check), like(x), card(card_of(check, x)), stream(current_stream(check, x)) {
    c.that(c.real("x", x) != DType::f32, "x", "float32", "bfloat16 or float16 on a CUDA device");
  }
  Launch launch(DType dtype) const {
    Launch l = {};
    l.dtype = dtype == DType::bf16 ? Element::bf16 : Element::f16;
    l.sm_count = card.sm_count, l.shared_limit = card.shared_limit, l.clusters = prefers_clusters(card);
    l.stream = stream.handle, l.op = stream.op;
    return l;
  }
  // From torch's allocator, so in the order of the stream; 16-bit or 32-bit elements.
  Tensor buffer(int64_t rows, int64_t columns) const { return like.empty({rows, columns}, like.dtype()); }
  Tensor ints(int64_t n) const { return like.empty({n}, aoti_torch_dtype_int32()); }
  Tensor floats(int64_t n) const { return like.empty({n}, aoti_torch_dtype_float32()); }
};

// Rows in expert order, in device memory. `sorted`: they came so, and a row is its own token.
struct RowMap {
  Tensor ints, floats;               // what the pointers point into, where it is not the caller's
  const int32_t* offsets = nullptr;  // [E + 1]
  const int32_t* token = nullptr;    // [R]; sorted: null
  const int32_t* row_of = nullptr;   // [T * K], -1 where dropped; sorted: null
  const float* weight = nullptr;     // [R]; null: ones
  int64_t R = 0, K = 1;              // R: most rows there can be
  bool sorted() const { return !token; }
};
RowMap sort_rows(const Call& call, const Tensor& ids, const Tensor& weights, int64_t E);
RowMap sorted_rows(const Call& call, const Tensor& offsets, const OptTensor& weights, int64_t E);
Tensor clamped_offsets(const Call& call, const Tensor& ends, int64_t rows, int64_t E);  // [E + 1]

// h [R, 2F] or null; y [T, D]
void experts_forward(const Call& call, const ExpertLayer& l, const RowMap& rows, void* h, void* y);
// h null: the pre-activation is computed again. Gradients::weight is laid out as the routing weights are.
void experts_backward(const Call& call, const ExpertLayer& l, const RowMap& rows, const void* dy, const void* h,
                      const Gradients& g);
}  // namespace sail::cuda
