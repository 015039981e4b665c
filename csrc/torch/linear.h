// What linear's host code checks of its arguments. M rows, N outputs, K inputs.
#pragma once
#include "checks.h"

namespace sail {
struct LinearSizes {
  DType dtype;
  int64_t M, N, K;
};

// x [M, K], weight [N, K]: rows of stride 1
inline LinearSizes check_linear(const Check& c, const Tensor& x, const Tensor& weight) {
  const DType dtype = c.real("x", x);
  c.rank("x", x, 2);
  c.rank("weight", weight, 2);
  const LinearSizes s = {dtype, x.size(0), weight.size(0), x.size(1)};
  c.shape("weight", weight, {s.N, s.K});
  c.dtype("weight", weight, x.dtype());
  c.same_device("weight", weight, x);
  const auto rows = [&](const char* arg, const Tensor& t) {
    c.that(t.stride(1) == 1 || s.K <= 1, arg, "rows of stride " + std::to_string(t.stride(1)), "rows of stride 1");
  };
  rows("x", x), rows("weight", weight);
  return s;
}
}  // namespace sail
