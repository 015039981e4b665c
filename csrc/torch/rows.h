// Checks that the ops on rows [..., D] share.
#pragma once
#include <algorithm>

#include "checks.h"

namespace sail {
inline void check_like(const Check& c, const char* arg, const Tensor& t, const Tensor& x) {
  c.same_device(arg, t, x);
  c.dtype(arg, t, x.dtype());
  c.that(t.dim() == x.dim() && std::equal(x.sizes(), x.sizes() + x.dim(), t.sizes()), arg, "shape " + shape_text(t),
         "shape " + shape_text(x));
}

// [n], contiguous, of x's dtype
inline void check_vector(const Check& c, const char* arg, const Tensor& t, const Tensor& x, int64_t n) {
  c.same_device(arg, t, x);
  c.dtype(arg, t, x.dtype());
  c.shape(arg, t, {n});
  c.contiguous(arg, t);
}
}  // namespace sail
