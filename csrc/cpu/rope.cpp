// Rotary embedding of q and k on the CPU, alone or after the norm of their heads, a token at a time: its row of the
// tables is widened once for all heads. A head dim; tokens are all dimensions before [heads, A].
#include "kernels/rope.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "../torch/rope.h"
#include "rows.h"

namespace sail::cpu {
namespace {
// Tokens that share one partial dweight: fixed, so that it has the same bits for any number of threads.
constexpr int64_t kTokens = 16;

// Where the tokens of a tensor lie whose last `inner` dimensions are a token's.
struct Walk {
  int64_t step[kMaxLead];  // bytes

  Walk(const Check& c, const char* arg, const Tensor& t, int64_t inner, const Tensor& q, int64_t bytes) {
    const TokenSteps steps(c, arg, t, inner, q);
    for (int i = 0; i < kMaxLead; i++) step[i] = steps.step[i] * bytes;
  }
  int64_t offset(int64_t token, const Tensor& q) const {
    int64_t bytes = 0;
    for (int64_t i = q.dim() - 3; i >= 0; i--) bytes += token % q.size(i) * step[i], token /= q.size(i);
    return bytes;
  }
};

// The rows of cos and sin, fp32 [A] each.
class Tables {
 public:
  Tables(const Check& c, const Tensor& cos, const Tensor& sin, const OptTensor& positions, const Tensor& q)
      : cos_(cos),
        sin_(sin),
        positions_(positions),
        q_(q),
        dtype_(check_tables(c, cos, sin, positions, q)),
        width_(cos.size(-1)),
        walk_cos_(c, "cos", cos, positions ? cos.dim() : 1, q, element_size(dtype_)),
        walk_sin_(c, "sin", sin, positions ? sin.dim() : 1, q, element_size(dtype_)) {
    if (!positions) return;
    wide_ = c.is_int64("positions", *positions);
    walk_positions_.emplace(c, "positions", *positions, 0, q, wide_ ? 8 : 4);
    for (int64_t t = 0, n = positions->numel() ? tokens() : 0; t < n; t++) check_position(c, position(t), cos.size(0));
  }

  int64_t tokens() const { return token_count(q_); }
  // Into out[0 .. 2A): cos, then sin.
  void row(int64_t token, float* out) const {
    const int64_t A = q_.size(-1), p = positions_ ? position(token) : 0;
    copy(cos_, positions_ ? p * cos_.stride(0) * element_size(dtype_) : walk_cos_.offset(token, q_), out);
    copy(sin_, positions_ ? p * sin_.stride(0) * element_size(dtype_) : walk_sin_.offset(token, q_), out + A);
  }

 private:
  int64_t position(int64_t token) const {
    const char* p = positions_->ptr<const char>() + walk_positions_->offset(token, q_);
    return wide_ ? *reinterpret_cast<const int64_t*>(p) : *reinterpret_cast<const int32_t*>(p);
  }
  void copy(const Tensor& table, int64_t offset, float* out) const {
    rope_kernels().widen[static_cast<int>(dtype_)](table.ptr<const char>() + offset, width_, out);
    if (width_ < q_.size(-1)) std::copy(out, out + width_, out + width_);
  }
  const Tensor &cos_, &sin_;
  const OptTensor& positions_;
  const Tensor& q_;
  DType dtype_;
  int64_t width_;
  Walk walk_cos_, walk_sin_;
  std::optional<Walk> walk_positions_;
  bool wide_ = false;
};

// q or k: the tensor that is read, the gradient that is read, and the one that is written.
struct Side {
  const Tensor &x, *grad;
  Tensor out;
  Walk walk_x, walk_grad;
  int64_t bytes, heads, A;
  std::vector<float> weight;

  Side(const Check& c, const char* arg, const Tensor& x_, const char* grad_arg, const Tensor* grad_,
       const char* weight_arg, const Tensor* weight_, const Tensor& q)
      : x(x_),
        grad(grad_),
        out(checked_like(c, arg, x_, q)),
        walk_x(c, arg, x_, 2, q, element_size(c.real(arg, x_))),
        walk_grad(c, arg, grad_ ? *grad_ : x_, 2, q, element_size(c.real(arg, x_))),
        bytes(element_size(c.real(arg, x_))),
        heads(x_.size(-2)),
        A(x_.size(-1)) {
    if (grad) check_head_grad(c, grad_arg, *grad, x);
    if (!weight_) return;
    c.vector(weight_arg, *weight_, x, A);
    weight.resize(A);
    rope_kernels().widen[static_cast<int>(c.real(arg, x))](weight_->data(), A, weight.data());
  }
  static Tensor checked_like(const Check& c, const char* arg, const Tensor& x, const Tensor& q) {
    check_heads(c, arg, x, q);
    return huge_like(x);
  }
  RopeHeads at(int64_t token, const Tensor& q, const float* tables, double eps, float* dweight) const {
    RopeHeads h = {};
    h.x = x.ptr<const char>() + walk_x.offset(token, q), h.x_step = x.stride(-2) * bytes;
    if (grad) h.grad = grad->ptr<const char>() + walk_grad.offset(token, q), h.grad_step = grad->stride(-2) * bytes;
    h.y = out.ptr<char>() + token * heads * A * bytes;
    h.weight = weight.data(), h.dweight = dweight;
    h.heads = heads, h.A = A, h.cos = tables, h.sin = tables + A, h.eps = static_cast<float>(eps);
    return h;
  }
};

int threads(int64_t elements) { return elements < 32768 ? 1 : num_threads(); }

// body(block, first token, last token, room for 2A floats)
template <class Body> void parallel_tokens(const Tables& tables, const Side& q, const Side& k, Body body) {
  const int64_t T = tables.tokens(), blocks = (T + kTokens - 1) / kTokens;
#pragma omp parallel for num_threads(threads(T*(q.heads + k.heads) * q.A))
  for (int64_t b = 0; b < blocks; b++) {
    std::vector<float> room(2 * q.A);
    body(b, b * kTokens, std::min(T, (b + 1) * kTokens), room.data());
  }
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                const OptTensor& positions, bool transpose) {
  const Check c("rope");
  Side sq(c, "q", q, "q", transpose ? &q : nullptr, "", nullptr, q);
  Side sk(c, "k", k, "k", transpose ? &k : nullptr, "", nullptr, q);
  const Tables tables(c, cos, sin, positions, q);
  const auto& kernels = rope_kernels();
  const auto kernel = (transpose ? kernels.rope_transposed : kernels.rope)[static_cast<int>(c.real("q", q))];
  parallel_tokens(tables, sq, sk, [&](int64_t, int64_t first, int64_t last, float* room) {
    for (int64_t t = first; t < last; t++) {
      tables.row(t, room);
      kernel(sq.at(t, q, room, 0, nullptr)), kernel(sk.at(t, q, room, 0, nullptr));
    }
  });
  return {std::move(sq.out), std::move(sk.out)};
}

std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                        const Tensor& k_weight, const Tensor& cos, const Tensor& sin,
                                        const OptTensor& positions, double eps) {
  const Check c("qk_norm_rope");
  Side sq(c, "q", q, "", nullptr, "q_weight_A", &q_weight, q), sk(c, "k", k, "", nullptr, "k_weight_A", &k_weight, q);
  const Tables tables(c, cos, sin, positions, q);
  const auto kernel = rope_kernels().norm_rope[static_cast<int>(c.real("q", q))];
  parallel_tokens(tables, sq, sk, [&](int64_t, int64_t first, int64_t last, float* room) {
    for (int64_t t = first; t < last; t++) {
      tables.row(t, room);
      kernel(sq.at(t, q, room, eps, nullptr)), kernel(sk.at(t, q, room, eps, nullptr));
    }
  });
  return {std::move(sq.out), std::move(sk.out)};
}

// The weights' gradients: fp32 over the heads of a token, fp64 over tokens.
std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward(const Tensor& dq_out, const Tensor& dk_out,
                                                                 const Tensor& q, const Tensor& k,
                                                                 const Tensor& q_weight, const Tensor& k_weight,
                                                                 const Tensor& cos, const Tensor& sin,
                                                                 const OptTensor& positions, double eps,
                                                                 bool need_dweights) {
  const Check c("qk_norm_rope_backward");
  Side sq(c, "q", q, "dq_out", &dq_out, "q_weight_A", &q_weight, q);
  Side sk(c, "k", k, "dk_out", &dk_out, "k_weight_A", &k_weight, q);
  const Tables tables(c, cos, sin, positions, q);
  const DType dtype = c.real("q", q);
  const int64_t A = sq.A, blocks = (tables.tokens() + kTokens - 1) / kTokens;
  const auto kernel = rope_kernels().norm_rope_backward[static_cast<int>(dtype)];
  std::vector<double> partial(need_dweights ? blocks * 2 * A : 0);
  parallel_tokens(tables, sq, sk, [&](int64_t b, int64_t first, int64_t last, float* room) {
    std::vector<float> sums(need_dweights ? 2 * A : 0);
    for (int64_t t = first; t < last; t++) {
      tables.row(t, room);
      kernel(sq.at(t, q, room, eps, need_dweights ? sums.data() : nullptr));
      kernel(sk.at(t, q, room, eps, need_dweights ? sums.data() + A : nullptr));
      for (size_t i = 0; i < sums.size(); i++) partial[b * 2 * A + i] += sums[i], sums[i] = 0;
    }
  });
  const int64_t n[] = {need_dweights ? A : 0};
  Tensor dqw = q.empty(n, q.dtype()), dkw = q.empty(n, q.dtype());
  if (need_dweights) {
    std::vector<double> total(2 * A);
    for (size_t i = 0; i < partial.size(); i++) total[i % (2 * A)] += partial[i];
    rope_kernels().narrow[static_cast<int>(dtype)](total.data(), A, dqw.data());
    rope_kernels().narrow[static_cast<int>(dtype)](total.data() + A, A, dkw.data());
  }
  return {std::move(sq.out), std::move(sk.out), std::move(dqw), std::move(dkw)};
}

const auto library = Library::impl("sail_ops", "CPU")
                         .kernel<rope>("rope")
                         .kernel<qk_norm_rope>("qk_norm_rope")
                         .kernel<qk_norm_rope_backward>("qk_norm_rope_backward");
}  // namespace
}  // namespace sail::cpu
