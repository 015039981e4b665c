// What swiglu asks of its arguments on every device; strides are each device's own.
#pragma once
#include "checks.h"

namespace sail {
inline DType check_swiglu(const Check& c, const Tensor& gate, const Tensor& up) {
  const DType dtype = c.real("gate", gate);
  c.rows("gate", gate);
  c.like("up", up, gate);
  return dtype;
}
}  // namespace sail
