// SwiGLU on the CPU. The work is cut into pieces of a row, or of the whole tensor where all arguments are contiguous.
#include "kernels/activation.h"

#include <algorithm>

#include "rows.h"

namespace sail::cpu {
namespace {
constexpr int64_t kPiece = 8192;  // elements: 16-32 KiB of each argument, enough to hide the cost of a loop iteration

struct Pieces {
  int64_t rows, width, per_row, bytes;

  Pieces(std::initializer_list<const Rows*> all, int64_t element) : bytes(element) {
    const Rows& first = **all.begin();
    const bool dense = std::all_of(all.begin(), all.end(), [=](const Rows* r) { return r->dense(element); });
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

void check_like(const Check& c, const char* arg, const Tensor& t, const Tensor& gate) {
  c.same_device(arg, t, gate);
  c.dtype(arg, t, gate.dtype());
  c.that(t.dim() == gate.dim() && std::equal(gate.sizes(), gate.sizes() + gate.dim(), t.sizes()), arg,
         "shape " + shape_text(t), "shape " + shape_text(gate));
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  const Check c("swiglu");
  const DType dtype = c.real("gate", gate);
  const Rows g(c, "gate", gate);
  check_like(c, "up", up, gate);
  const Rows u(c, "up", up);
  Tensor out = huge_like(gate);
  const Rows o(c, "out", out);
  const auto kernel = activation_kernels().swiglu[static_cast<int>(dtype)];
  const bool stream = streams(c, out, g.width());
  Pieces({&g, &u, &o}, element_size(dtype)).parallel([&](int64_t row, int64_t at, int64_t n) {
    kernel(g[row] + at, u[row] + at, o[row] + at, n, stream);
  });
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  const Check c("swiglu_backward");
  const DType dtype = c.real("gate", gate);
  const Rows g(c, "gate", gate);
  check_like(c, "up", up, gate);
  check_like(c, "grad", grad, gate);
  const Rows u(c, "up", up), d(c, "grad", grad);
  Tensor dgate = huge_like(gate), dup = huge_like(gate);
  const Rows dg(c, "dgate", dgate), du(c, "dup", dup);
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
