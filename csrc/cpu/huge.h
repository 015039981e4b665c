// New tensors in huge pages, where they are large enough for them.
#pragma once
#include "../torch/checks.h"
#include "workspace.h"

namespace sail::cpu {
inline Tensor in_huge_pages(Tensor t) {
  advise_huge_pages(t.data(), t.numel() * (t.dtype() == aoti_torch_dtype_float32() ? 4 : 2));
  return t;
}
inline Tensor huge_like(const Tensor& t) { return in_huge_pages(t.empty_like()); }
template <size_t N> Tensor empty_huge(const Tensor& like, const int64_t (&sizes)[N], int32_t dtype) {
  return in_huge_pages(like.empty(sizes, dtype));
}
}  // namespace sail::cpu
