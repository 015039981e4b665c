// Rotary embedding of q and k on CUDA, alone or after the norm of their heads: check, merge the tokens' dimensions,
// launch once for both. Nothing synchronizes but the check of positions under SAIL_OPS_CHECK=1.
#include "../torch/rope.h"

#include <vector>

#include "card.h"
#include "kernels/rope.cuh"
#include "rows.h"

namespace sail::cuda {
namespace {
using Steps = std::vector<TokenSteps*>;

// Joins neighboring dimensions of the tokens that one stride walks in every tensor: [B, S] is mostly one dimension, or
// two where cos and sin are the same for every sequence. Returns how many are left; they end at kMaxLead.
int merge_tokens(const Tensor& q, const Steps& steps, int64_t (&size)[kMaxLead]) {
  int dims = 0;
  for (int64_t i = 0; i + 2 < q.dim(); i++) {
    if (q.size(i) == 1) continue;
    bool joins = dims > 0;
    for (const TokenSteps* s : steps) joins = joins && s->step[dims - 1] == s->step[i] * q.size(i);
    if (!joins) size[dims++] = 1;
    size[dims - 1] *= q.size(i);
    for (TokenSteps* s : steps) s->step[dims - 1] = s->step[i];
  }
  return dims;
}

// A call after its checks, but for what q and k are.
struct Call {
  Check c;
  DType dtype, table;
  TokenSteps q, k, dq, dk, cos, sin, positions;
  Rope a = {};
  bool vectors;

  Call(const char* op, const Tensor& q_, const Tensor& k_, const Tensor* dq_, const Tensor* dk_, const Tensor& cos_,
       const Tensor& sin_, const OptTensor& positions_)
      : c(op), dtype(check_heads(c, "q", q_, q_)) {
    check_heads(c, "k", k_, q_);
    if (dq_) check_head_grad(c, "dq_out", *dq_, q_), check_head_grad(c, "dk_out", *dk_, k_);
    c.that(q_.size(-1) <= kRopeMost, "q", "A = " + std::to_string(q_.size(-1)),
           "at most " + std::to_string(kRopeMost) + " on a CUDA device");
    table = check_tables(c, cos_, sin_, positions_, q_);
    q = {c, "q", q_, 2, q_}, k = {c, "k", k_, 2, q_};
    if (dq_) dq = {c, "dq_out", *dq_, 2, q_}, dk = {c, "dk_out", *dk_, 2, q_};
    if (positions_)
      positions = {c, "positions", *positions_, 0, q_};
    else
      cos = {c, "cos", cos_, 1, q_}, sin = {c, "sin", sin_, 1, q_};
    set_tables(cos_, sin_, positions_);
    set_tokens(q_);
    side(a.q, q_, dq_, q, dq), side(a.k, k_, dk_, k, dk);
    const int64_t element = element_size(dtype), half = a.A / 2;
    vectors = aligned(element, {a.q.x, a.k.x, a.q.grad, a.k.grad},
                      {half, a.q.x_head, a.k.x_head, a.q.grad_head, a.k.grad_head}) &&
              aligned(element_size(table), {a.cos, a.sin}, {a.cos_row, a.sin_row, half});
    for (const TokenSteps* s : {&q, &k, &dq, &dk})
      for (int64_t step : s->step) vectors = vectors && step * element % 16 == 0;
    for (const TokenSteps* s : {&cos, &sin})
      for (int64_t step : s->step) vectors = vectors && step * element_size(table) % 16 == 0;
  }

  void weigh(const Tensor& q_weight, const Tensor& k_weight, const Tensor& q_, double eps) {
    c.vector("q_weight_A", q_weight, q_, a.A), c.vector("k_weight_A", k_weight, q_, a.A);
    a.q.weight = q_weight.data(), a.k.weight = k_weight.data(), a.eps = static_cast<float>(eps);
    vectors = vectors && aligned(element_size(dtype), {a.q.weight, a.k.weight}, {});
  }

  // Lanes of a head: a power of two
  int lanes() const {
    int n = 1;
    while (n * kHalf < a.A / 2) n *= 2;
    return n;
  }
  int groups() const { return kRopeThreads / lanes(); }

 private:
  void set_tables(const Tensor& cos_, const Tensor& sin_, const OptTensor& positions_) {
    a.cos = cos_.data(), a.sin = sin_.data(), a.table = static_cast<Scalar>(table);
    a.width = static_cast<int>(cos_.size(-1));
    if (!positions_) return;
    a.cos_row = cos_.stride(0), a.sin_row = sin_.stride(0), a.rows = cos_.size(0);
    a.positions = positions_->data(), a.wide_positions = c.is_int64("positions", *positions_);
  }
  void set_tokens(const Tensor& q_) {
    int64_t size[kMaxLead] = {};
    a.tokens = token_count(q_), a.A = static_cast<int>(q_.size(-1));
    c.that(a.tokens <= INT32_MAX, "q", "shape " + shape_text(q_), "at most 2147483647 tokens");
    const int dims = merge_tokens(q_, {&q, &k, &dq, &dk, &cos, &sin, &positions}, size);
    c.that(dims <= kRopeDims, "q", "tokens of " + std::to_string(dims) + " uneven dimensions, shape " + shape_text(q_),
           "at most " + std::to_string(kRopeDims) + " on a CUDA device: a contiguous q or k");
    for (int i = 0; i < kRopeDims; i++) a.size[i] = i < dims ? static_cast<int>(size[i]) : 1;
    // dimensions past the last one have size 1: their tokens' index is 0
    a.cos_token = along(cos), a.sin_token = along(sin), a.position_token = along(positions);
  }
  static TokenStrides along(const TokenSteps& s) { return {{s.step[0], s.step[1], s.step[2]}}; }
  void side(RopeSide& s, const Tensor& x, const Tensor* grad, const TokenSteps& steps, const TokenSteps& grad_steps) {
    s.x = x.data(), s.x_token = along(steps), s.x_head = x.stride(-2);
    if (grad) s.grad = grad->data(), s.grad_token = along(grad_steps), s.grad_head = grad->stride(-2);
    s.heads = static_cast<int>(x.size(-2));
    const int of_item = grad ? kRopeBack : kRopeHeads;
    s.per_token = (s.heads + of_item - 1) / of_item;
  }
};

void check_positions(const Call& call, const Tensor& positions, const Stream& stream) {
  const int64_t bytes = call.a.wide_positions ? 8 : 4;
  std::vector<char> value(bytes);
  for (int64_t t = 0; t < call.a.tokens; t++) {
    int64_t offset = 0, rest = t;
    for (int i = kRopeDims - 1; i >= 0; i--) {
      offset += (i ? rest % call.a.size[i] : rest) * call.a.position_token.along[i];
      rest /= call.a.size[i];
    }
    copy_to_host(value.data(), positions.ptr<const char>() + offset * bytes, bytes, 1, bytes, stream);
    check_position(
        call.c,
        bytes == 8 ? *reinterpret_cast<const int64_t*>(value.data()) : *reinterpret_cast<const int32_t*>(value.data()),
        call.a.rows);
  }
}

template <bool kNorm> void launch_rope(const Call& call, const Tensor& q, const OptTensor& positions) {
  const DeviceGuard guard(q.device_index());
  const Stream stream = current_stream(call.c, q);
  if (positions && check_values()) check_positions(call, *positions, stream);
  const int64_t items = call.a.tokens * std::max(call.a.q.per_token, call.a.k.per_token), groups = call.groups();
  if (!items) return;
  const Grid grid((items + groups - 1) / groups, 2);
  const dim3 block(call.lanes(), groups);
  dispatch(call.dtype, call.vectors, [&](auto t, auto width) {
    launch(rope_kernel<decltype(t), decltype(width)::value, kNorm>, grid, block, 0, stream, call.a);
  });
}

std::tuple<Tensor, Tensor> rope_cuda(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                     const OptTensor& positions, bool transpose) {
  Call call("rope", q, k, nullptr, nullptr, cos, sin, positions);
  Tensor q_out = q.empty_like(), k_out = k.empty_like();
  call.a.q.out = q_out.data(), call.a.k.out = k_out.data(), call.a.transpose = transpose;
  launch_rope<false>(call, q, positions);
  return {std::move(q_out), std::move(k_out)};
}

std::tuple<Tensor, Tensor> qk_norm_rope_cuda(const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                             const Tensor& k_weight, const Tensor& cos, const Tensor& sin,
                                             const OptTensor& positions, double eps) {
  Call call("qk_norm_rope", q, k, nullptr, nullptr, cos, sin, positions);
  call.weigh(q_weight, k_weight, q, eps);
  Tensor q_out = q.empty_like(), k_out = k.empty_like();
  call.a.q.out = q_out.data(), call.a.k.out = k_out.data();
  launch_rope<true>(call, q, positions);
  return {std::move(q_out), std::move(k_out)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward_cuda(const Tensor& dq_out, const Tensor& dk_out,
                                                                      const Tensor& q, const Tensor& k,
                                                                      const Tensor& q_weight, const Tensor& k_weight,
                                                                      const Tensor& cos, const Tensor& sin,
                                                                      const OptTensor& positions, double eps,
                                                                      bool need_dweights) {
  Call call("qk_norm_rope_backward", q, k, &dq_out, &dk_out, cos, sin, positions);
  call.weigh(q_weight, k_weight, q, eps);
  Rope& a = call.a;
  const auto wanted = [&] { return q.empty({need_dweights ? a.A : 0}, q.dtype()); };
  Tensor dq = q.empty_like(), dk = k.empty_like(), dq_weight = wanted(), dk_weight = wanted();
  const RowPlan plan = {call.lanes(), call.groups(), true};
  const int64_t q_items = a.tokens * a.q.per_token, k_items = a.tokens * a.k.per_token;
  a.items_of_block = rows_of_block(std::max(q_items, k_items), plan, card_of(call.c, q).sm_count);
  const auto blocks = [&](int64_t items) { return (items + a.items_of_block - 1) / a.items_of_block; };
  const auto partial = [&](int64_t items) {
    return q.empty({need_dweights ? blocks(items) : 0, a.A}, aoti_torch_dtype_float32());
  };
  const Tensor q_partial = partial(q_items), k_partial = partial(k_items);
  a.q.out = dq.data(), a.k.out = dk.data();
  if (need_dweights) a.q.dweight = q_partial.ptr<float>(), a.k.dweight = k_partial.ptr<float>();
  const DeviceGuard guard(q.device_index());
  const Stream stream = current_stream(call.c, q);
  const Grid grid(blocks(std::max(q_items, k_items)), 2);
  dispatch(call.dtype, call.vectors, [&](auto t, auto width) {
    if (grid.x)
      launch(qk_norm_rope_backward_kernel<decltype(t), decltype(width)::value>, grid, dim3(plan.threads, plan.slots),
             a.A * 2, stream, a);
  });
  if (need_dweights)
    launch_sum_rows(call.dtype, column_sum(q_partial, dq_weight), column_sum(k_partial, dk_weight), a.A, stream);
  return {std::move(dq), std::move(dk), std::move(dq_weight), std::move(dk_weight)};
}

const auto library = Library::impl("sail_ops", "CUDA")
                         .kernel<rope_cuda>("rope")
                         .kernel<qk_norm_rope_cuda>("qk_norm_rope")
                         .kernel<qk_norm_rope_backward_cuda>("qk_norm_rope_backward");
}  // namespace
}  // namespace sail::cuda
