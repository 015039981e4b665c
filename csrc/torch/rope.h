// What the rotary embedding's host code shares between devices: the checks of its arguments, and where tokens lie.
// A head dim; tokens are all dimensions of q [..., heads, A] before the last two.
#pragma once
#include "checks.h"

namespace sail {
constexpr int kMaxLead = 6;

// Elements from one token to the next along each leading dimension of q, in a tensor whose last `inner` dimensions are a
// token's; along dimensions of size 1 (allowed where inner < 2) and missing ones its tokens are repeated.
struct TokenSteps {
  int64_t step[kMaxLead] = {};

  TokenSteps() = default;
  TokenSteps(const Check& c, const char* arg, const Tensor& t, int64_t inner, const Tensor& q) {
    const int64_t lead = q.dim() - 2, own = t.dim() - inner;
    bool fits = own >= 0 && own <= lead;
    for (int64_t i = 0; fits && i < own; i++) {
      const int64_t size = t.size(i), at = lead - own + i;
      fits = size == q.size(at) || (size == 1 && inner < 2);
      step[at] = size == 1 ? 0 : t.stride(i);
    }
    c.that(fits, arg, "shape " + shape_text(t), "dimensions that fit the tokens of q, shape " + shape_text(q));
  }
};

inline int64_t token_count(const Tensor& q) {
  int64_t n = 1;
  for (int64_t i = 0; i + 2 < q.dim(); i++) n *= q.size(i);
  return n;
}

// q or k
inline DType check_heads(const Check& c, const char* arg, const Tensor& x, const Tensor& q) {
  const DType dtype = c.real(arg, x);
  c.that(x.dim() >= 3 && x.dim() <= kMaxLead + 2, arg, "shape " + shape_text(x), "3 to 8 dimensions, [..., heads, A]");
  c.that(x.dim() == q.dim() && x.size(-1) == q.size(-1), arg, "shape " + shape_text(x),
         "q's tokens and head dim, of shape " + shape_text(q));
  c.that(x.size(-1) > 0 && x.size(-1) % 2 == 0, arg, "A = " + std::to_string(x.size(-1)), "an even A of at least 2");
  c.that(x.stride(-1) == 1, arg, "stride " + std::to_string(x.stride(-1)), "a last dimension of stride 1");
  c.dtype(arg, x, q.dtype());
  c.same_device(arg, x, q);
  return dtype;
}

inline void check_head_grad(const Check& c, const char* arg, const Tensor& grad, const Tensor& x) {
  c.like(arg, grad, x);
  c.that(grad.stride(-1) == 1, arg, "strided heads", "a last dimension of stride 1");
}

// cos and sin, and the positions that index their rows; the positions' values are each device's to check
inline DType check_tables(const Check& c, const Tensor& cos, const Tensor& sin, const OptTensor& positions,
                          const Tensor& q) {
  const DType dtype = c.real("cos", cos);
  const int64_t A = q.size(-1);
  c.that(cos.dim() >= 1 && (!positions || cos.dim() == 2), "cos", "shape " + shape_text(cos),
         positions ? "2 dimensions" : "[..., A] or [..., A/2]");
  c.dtype("sin", sin, cos.dtype());
  c.same_device("cos", cos, q), c.same_device("sin", sin, q);
  c.that(cos.dim() == sin.dim() && std::equal(cos.sizes(), cos.sizes() + cos.dim(), sin.sizes()), "sin",
         "shape " + shape_text(sin), "cos's shape " + shape_text(cos));
  c.that(cos.size(-1) == A || 2 * cos.size(-1) == A, "cos", "shape " + shape_text(cos),
         "rows of A = " + std::to_string(A) + " or A/2 elements");
  c.that(cos.stride(-1) == 1 && sin.stride(-1) == 1, "cos", "strided rows", "contiguous rows in cos and sin");
  if (positions) c.same_device("positions", *positions, q), c.is_int64("positions", *positions);
  return dtype;
}

inline void check_position(const Check& c, int64_t position, int64_t rows) {
  c.that(position >= 0 && position < rows, "positions", std::to_string(position),
         "rows of cos, in [0, " + std::to_string(rows) + ")");
}
}  // namespace sail
