// y = x . weight^T + bias and its gradients on the CPU, by the products of product.h.
#include "../torch/linear.h"

#include <tuple>

#include "huge.h"
#include "product.h"

namespace sail::cpu {
namespace {
Matrix matrix(const Tensor& t) { return {t.data(), t.stride(0)}; }

Tensor linear(const Tensor& x, const Tensor& weight, const OptTensor& bias) {
  const Check c("linear");
  const LinearSizes s = check_linear(c, x, weight);
  if (bias) c.vector("bias", *bias, x, s.N);
  Tensor y = x.empty({s.M, s.N}, x.dtype());
  product_nt(s.dtype, matrix(x), matrix(weight), bias ? bias->data() : nullptr, s.M, s.N, s.K, y.data());
  return y;
}

std::tuple<Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, bool need_dx,
                                           bool need_dweight) {
  const Check c("linear_backward");
  const LinearSizes s = check_linear(c, x, weight);
  c.dtype("dy", dy, x.dtype());
  c.shape("dy", dy, {s.M, s.N});
  c.contiguous("dy", dy);
  Tensor dx = x.empty({need_dx ? s.M : 0, s.K}, x.dtype());
  Tensor dweight = empty_huge(x, {need_dweight ? s.N : 0, s.K}, x.dtype());
  if (need_dx) product_nn(s.dtype, matrix(dy), matrix(weight), s.M, s.K, s.N, dx.data(), false);
  if (need_dweight) product_tn(s.dtype, matrix(dy), matrix(x), s.N, s.K, s.M, dweight.data());
  return {std::move(dx), std::move(dweight)};
}

const auto library =
    Library::impl("sail_ops", "CPU").kernel<linear>("linear").kernel<linear_backward>("linear_backward");
}  // namespace
}  // namespace sail::cpu
