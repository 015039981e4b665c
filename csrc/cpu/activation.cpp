// SwiGLU on the CPU. The work is cut into pieces of a row, or of the whole tensor where all arguments are contiguous.
#include "kernels/activation.h"

#include <algorithm>

#include "../torch/activation.h"
#include "rows.h"

namespace sail::cpu {
namespace {
constexpr int64_t kPiece = 8192;  // elements: 16-32 KiB of each argument, enough to hide the cost of a loop iteration

struct Pieces {
  int64_t rows, width, per_row, bytes;

  Pieces(std::initializer_list<const StridedRows*> all, int64_t element) : bytes(element) {
    const StridedRows& first = **all.begin();
    const bool dense = std::all_of(all.begin(), all.end(), [=](const StridedRows* r) { return r->dense(element); });
    rows = dense && first.count() ? 1 : first.count();
    width = dense ? first.count() * first.width() : first.width();
    per_row = (width + kPiece - 1) / kPiece;
  }

  // body(row, offset in bytes, elements)
  template <class Body> void parallel(Body body) const {
    const int64_t n = rows * per_row;
#pragma omp parallel for num_threads(n* std::min(width, kPiece) < 2 * kPiece ? 1 : num_threads())
    for (int64_t i = 0; i < n; i++) {
      const int64_t start = i % per_row * kPiece;
      body(i / per_row, start * bytes, std::min(kPiece, width - start));
    }
  }
};

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  const Check c("swiglu");
  const DType dtype = check_swiglu(c, gate, up);
  const StridedRows g(c, "gate", gate), u(c, "up", up);
  Tensor out = huge_like(gate);
  const StridedRows o(c, "out", out);
  const auto kernel = activation_kernels().swiglu[static_cast<int>(dtype)];
  const bool stream = streams(c, out, g.width());
  Pieces({&g, &u, &o}, element_size(dtype)).parallel([&](int64_t row, int64_t at, int64_t n) {
    kernel(g[row] + at, u[row] + at, o[row] + at, n, stream);
  });
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  const Check c("swiglu_backward");
  const DType dtype = check_swiglu(c, gate, up);
  c.like("grad", grad, gate);
  const StridedRows g(c, "gate", gate), u(c, "up", up), d(c, "grad", grad);
  Tensor dgate = huge_like(gate), dup = huge_like(gate);
  const StridedRows dg(c, "dgate", dgate), du(c, "dup", dup);
  const auto kernel = activation_kernels().swiglu_backward[static_cast<int>(dtype)];
  const bool stream = streams(c, dgate, g.width()) && streams(c, dup, g.width());
  Pieces({&d, &g, &u, &dg, &du}, element_size(dtype)).parallel([&](int64_t row, int64_t at, int64_t n) {
    kernel(d[row] + at, g[row] + at, u[row] + at, dg[row] + at, du[row] + at, n, stream);
  });
  return {std::move(dgate), std::move(dup)};
}

const auto library =
    Library::impl("sail_ops", "CPU").kernel<swiglu>("swiglu").kernel<swiglu_backward>("swiglu_backward");
}  // namespace
}  // namespace sail::cpu
