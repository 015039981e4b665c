// Cross-entropy of a linear head on the CPU, a chunk of tokens at a time. The products are torch's, or ours where torch
// has none for the dtype (product.h); softmax and gradient are ours. Logits are transposed, [V, chunk]: in two of the three
// products the V rows are then the rows of the larger operand as they lie in memory, and nothing but the chunk's hidden
// states is packed.
// T tokens, D hidden, V vocabulary, N labeled tokens; the others are left out from the start and cost nothing.
#include "kernels/loss.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../torch/loss.h"
#include "kernels/elements.h"
#include "product.h"
#include "rows.h"
#include "workspace.h"

namespace sail::cpu {
namespace {
// Tokens of a chunk, measured on Zen 4 at D = 1024, V = 151,936 in bf16 (GFLOP/s of the three products together): 64
// 305, 128 375, 256 380, 512 378. Where the head has a gradient there are at most kChunks of them: each rounds it once.
constexpr int64_t kChunk = 128, kChunks = 8;
constexpr int64_t kBlock =
    1024;  // rows of [V, chunk] a task: fixed, so that the sums' order does not follow the threads

struct Head {
  const Tensor &hidden, &lm_head;  // [T, D], [V, D]
  std::vector<int64_t> tokens;     // the N labeled ones
  std::vector<int64_t> labels;     // theirs
  DType dtype;
  int64_t T, D, V, row_bytes;
  double z_loss;
  int64_t N() const { return static_cast<int64_t>(tokens.size()); }
};

Head check_head(const Check& c, const Tensor& hidden, const Tensor& lm_head, const Tensor& labels, int64_t ignore_index,
                double z_loss) {
  const LossSizes s = check_loss(c, hidden, lm_head, labels, z_loss);
  Head h{.hidden = hidden,
         .lm_head = lm_head,
         .tokens = {},
         .labels = {},
         .dtype = s.dtype,
         .T = s.T,
         .D = s.D,
         .V = s.V,
         .row_bytes = s.D * element_size(s.dtype),
         .z_loss = z_loss};
  const bool wide = c.is_int64("labels", labels);
  for (int64_t t = 0; t < h.T; t++) {
    const int64_t at = t * labels.stride(0);
    const int64_t label = wide ? labels.ptr<const int64_t>()[at] : labels.ptr<const int32_t>()[at];
    if (label == ignore_index) continue;
    check_label(c, label, t, h.V, ignore_index);
    h.tokens.push_back(t), h.labels.push_back(label);
  }
  return h;
}

void mm(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate = false) {
  ok(accumulate ? aoti_torch_cpu_addmm_out(out.handle(), out.handle(), a.handle(), b.handle(), 1, 1)
                : aoti_torch_cpu_mm_out(out.handle(), a.handle(), b.handle()),
     "mm");
}

// The three products of a chunk of n tokens, by torch or by the expert layer's kernels.
struct Products {
  const Head& h;
  const bool torch = torch_multiplies(h.dtype) || h.lm_head.stride(1) != 1;  // ours take rows

  Matrix head() const { return {h.lm_head.data(), h.lm_head.stride(0)}; }
  // logits[V, n] = lm_head . x^T
  void logits(const Tensor& out, const Tensor& x, int64_t n) const {
    if (torch) return mm(out.view({h.V, n}, {n, 1}), h.lm_head, x.view({h.D, n}, {1, h.D}));
    product_nt(h.dtype, head(), {x.data(), h.D}, nullptr, h.V, n, h.D, out.data());
  }
  // dlm_head[V, D] (+)= g . x
  void dlm_head(const Tensor& out, const Tensor& g, const Tensor& x, int64_t n, bool accumulate) const {
    if (torch) return mm(out, g.view({h.V, n}, {n, 1}), x.view({n, h.D}, {h.D, 1}), accumulate);
    product_nn(h.dtype, {g.data(), n}, {x.data(), h.D}, h.V, h.D, n, out.data(), accumulate);
  }
  // dx[n, D] = g^T . lm_head
  void dx(const Tensor& out, const Tensor& g, int64_t n) const {
    if (torch) return mm(out.view({n, h.D}, {h.D, 1}), g.view({n, h.V}, {1, n}), h.lm_head);
    product_tn(h.dtype, {g.data(), n}, head(), n, h.D, h.V, out.data());
  }
};

float read(const Head& h, const Tensor& t, int64_t i) {
  if (h.dtype == DType::f32) return t.ptr<const float>()[i];
  const uint16_t bits = t.ptr<const uint16_t>()[i];
  return h.dtype == DType::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
}

// Of the N labeled tokens, in order. In fp64: an error of lse would be one of a token's whole gradient.
struct Values {
  std::vector<double> lse, target;  // target: the label's logit
  const float* scale;               // [T]
};

template <class Body> void parallel_blocks(const Head& h, int64_t n, Body body) {
  const int64_t blocks = (h.V + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(h.V* n < 32768 ? 1 : num_threads())
  for (int64_t b = 0; b < blocks; b++) body(b, b * kBlock, std::min(kBlock, h.V - b * kBlock));
}

// lse = log sum exp of n columns, from the blocks' maxima and sums in their order
void log_sum_exp(const Head& h, const Tensor& logits, int64_t n, double* lse) {
  const int64_t blocks = (h.V + kBlock - 1) / kBlock;
  std::vector<float> max(blocks * n), sum(blocks * n);
  parallel_blocks(h, n, [&](int64_t b, int64_t row, int64_t rows) {
    const char* at = logits.ptr<const char>() + row * n * element_size(h.dtype);
    loss_kernels().softmax_statistics[static_cast<int>(h.dtype)](at, rows, n, &max[b * n], &sum[b * n]);
  });
  for (int64_t t = 0; t < n; t++) {
    float m = max[t];
    for (int64_t b = 1; b < blocks; b++) m = std::max(m, max[b * n + t]);
    double s = 0;
    for (int64_t b = 0; b < blocks; b++) s += sum[b * n + t] * std::exp(static_cast<double>(max[b * n + t]) - m);
    lse[t] = m + std::log(s);
  }
}

// logits become the loss's gradient: scale ((1 + 2 z lse) softmax - [v is the label])
void turn_into_gradient(const Head& h, const Values& values, const Tensor& logits, int64_t first, int64_t n) {
  std::vector<float> shift(n), factor(n);
  for (int64_t i = 0; i < n; i++) {
    const double lse = values.lse[first + i];
    shift[i] = static_cast<float>(lse);
    const double rest = std::exp(shift[i] - lse);  // what rounding the shift took
    factor[i] = static_cast<float>(values.scale[h.tokens[first + i]] * (1 + 2 * h.z_loss * lse) * rest);
  }
  parallel_blocks(h, n, [&](int64_t, int64_t row, int64_t rows) {
    char* at = logits.ptr<char>() + row * n * element_size(h.dtype);
    loss_kernels().softmax_gradient[static_cast<int>(h.dtype)](at, rows, n, shift.data(), factor.data());
  });
  for (int64_t i = 0; i < n; i++) {
    const double p = std::exp(values.target[first + i] - shift[i]);
    const float g = static_cast<float>(factor[i] * p - values.scale[h.tokens[first + i]]);
    loss_kernels().store[static_cast<int>(h.dtype)](logits.data(), h.labels[first + i] * n + i, g);
  }
}

// The chunks: gather, logits, statistics, and the gradients that have a tensor to go to.
void run(const Head& h, Values& values, const Tensor* dhidden, const Tensor* dlm_head) {
  const int64_t N = h.N(), D = h.D, V = h.V;
  if (dhidden && h.T) std::memset(dhidden->data(), 0, h.T * h.row_bytes);  // of tokens without a label
  if (dlm_head && !N) std::memset(dlm_head->data(), 0, V * h.row_bytes);
  if (!N) return;
  int64_t chunks = (N + kChunk - 1) / kChunk;
  if (dlm_head) chunks = std::min(chunks, kChunks);
  const int64_t most = std::min(N, ((N + chunks - 1) / chunks + 15) / 16 * 16);
  const int32_t dtype = h.hidden.dtype();
  const Tensor x = h.hidden.empty({most, D}, dtype), dx = h.hidden.empty({dhidden ? most : 0, D}, dtype);
  const Tensor buffer = h.hidden.empty({V * most}, dtype);
  advise_huge_pages(buffer.data(), V * most * element_size(h.dtype));
  const Products products{h};
  for (int64_t first = 0; first < N; first += most) {
    const int64_t n = std::min(most, N - first), step = h.hidden.stride(0) * element_size(h.dtype);
    for (int64_t i = 0; i < n; i++)
      std::memcpy(x.ptr<char>() + i * h.row_bytes, h.hidden.ptr<char>() + h.tokens[first + i] * step, h.row_bytes);
    const Tensor logits_Vn = buffer.view({V, n}, {n, 1});
    products.logits(logits_Vn, x, n);
    for (int64_t i = 0; i < n; i++) values.target[first + i] = read(h, logits_Vn, h.labels[first + i] * n + i);
    log_sum_exp(h, logits_Vn, n, &values.lse[first]);
    if (dhidden || dlm_head) turn_into_gradient(h, values, logits_Vn, first, n);
    if (dlm_head) products.dlm_head(*dlm_head, logits_Vn, x, n, first > 0);
    if (!dhidden) continue;
    products.dx(dx, logits_Vn, n);
    for (int64_t i = 0; i < n; i++)
      std::memcpy(dhidden->ptr<char>() + h.tokens[first + i] * h.row_bytes, dx.ptr<char>() + i * h.row_bytes,
                  h.row_bytes);
  }
}

Tensor gradient_of(const Tensor& t, bool needed, const Head& h) {
  const int64_t rows = needed ? t.size(0) : 0;
  Tensor out = t.empty({rows, h.D}, t.dtype());
  advise_huge_pages(out.data(), rows * h.row_bytes);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(const Tensor& hidden, const Tensor& lm_head,
                                                                const Tensor& labels, const OptTensor& scale,
                                                                int64_t ignore_index, double z_loss, bool need_dhidden,
                                                                bool need_dlm_head) {
  const Check c("linear_cross_entropy");
  const Head h = check_head(c, hidden, lm_head, labels, ignore_index, z_loss);
  const std::vector<float> ones(scale ? 0 : h.T, 1.f);
  Values values{std::vector<double>(h.N()), std::vector<double>(h.N()), ones.data()};
  if (scale) values.scale = check_token_weights(c, *scale, hidden);
  Tensor dhidden = gradient_of(hidden, need_dhidden, h), dlm_head = gradient_of(lm_head, need_dlm_head, h);
  run(h, values, need_dhidden ? &dhidden : nullptr, need_dlm_head ? &dlm_head : nullptr);

  Tensor logprobs = hidden.empty({h.T}, aoti_torch_dtype_float32()), lse = logprobs.empty_like();
  std::fill_n(logprobs.ptr<float>(), h.T, 0.f), std::fill_n(lse.ptr<float>(), h.T, 0.f);
  for (int64_t i = 0; i < h.N(); i++) {
    lse.ptr<float>()[h.tokens[i]] = static_cast<float>(values.lse[i]);
    logprobs.ptr<float>()[h.tokens[i]] = static_cast<float>(values.target[i] - values.lse[i]);
  }
  return {std::move(logprobs), std::move(lse), std::move(dhidden), std::move(dlm_head)};
}

const auto library = Library::impl("sail_ops", "CPU").kernel<linear_cross_entropy>("linear_cross_entropy");
}  // namespace
}  // namespace sail::cpu
