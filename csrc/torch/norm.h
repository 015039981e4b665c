// What the norms ask of their arguments on every device; strides are each device's own. Rows [..., D].
#pragma once
#include "checks.h"

namespace sail {
inline DType check_norm(const Check& c, const Tensor& x, const Tensor* residual, const Tensor& weight,
                        const OptTensor& bias) {
  const DType dtype = c.real("x", x);
  c.rows("x", x);
  if (residual) c.like("residual", *residual, x);
  c.vector("weight_D", weight, x, x.size(-1));
  if (bias) c.vector("bias_D", *bias, x, x.size(-1));
  return dtype;
}

inline DType check_norm_backward(const Check& c, const Tensor& grad, const OptTensor& grad_sum, const Tensor& x,
                                 const Tensor& weight) {
  const DType dtype = c.real("x", x);
  c.rows("x", x);
  c.like("grad", grad, x);
  if (grad_sum) c.like("grad_sum", *grad_sum, x);
  c.vector("weight_D", weight, x, x.size(-1));
  return dtype;
}
}  // namespace sail
