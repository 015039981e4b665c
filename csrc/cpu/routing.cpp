// The router on the CPU: check, split the tokens over threads, add up the statistics in an order that no thread
// changes.
#include "kernels/routing.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "../torch/routing.h"
#include "rows.h"

namespace sail::cpu {
namespace {
constexpr int64_t kBlock = 64;  // tokens that share partial statistics: those cost 1/64 of the logits' own traffic

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor>;

int threads(int64_t blocks) { return blocks < 2 ? 1 : num_threads(); }

// out[t, k] = ids[t, k], each in [0, E)
void read_ids(const Check& c, const Tensor& ids, int64_t T, int64_t K, const Tensor& logits, int64_t* out) {
  const bool wide = check_ids(c, ids, T, K, logits);
  for (int64_t i = 0; i < T * K; i++) {
    out[i] = wide ? ids.ptr<const int64_t>()[i] : ids.ptr<const int32_t>()[i];
    check_id(c, out[i], logits.size(1));
  }
}

Routed route_topk(const Tensor& logits, int64_t K, bool renormalize, const OptTensor& bias, const OptTensor& replay,
                  const OptTensor& mask) {
  const Check c("route_topk");
  const DType dtype = check_logits(c, logits);
  const StridedRows in(c, "logits_TE", logits);
  const int64_t T = logits.size(0), E = logits.size(1), padded = routing_padded(E);
  check_top_k(c, K, E);
  const float* bias_E = check_floats(c, "bias_E", bias, {E}, logits);
  const bool* mask_T = check_mask(c, mask, T, logits);
  const int64_t by_token[] = {T, K}, by_expert[] = {E};
  Tensor weights = logits.empty(by_token, aoti_torch_dtype_float32());
  Tensor ids = logits.empty(by_token, aoti_torch_dtype_int64());
  Tensor counts = logits.empty(by_expert, aoti_torch_dtype_int64());
  Tensor prob_sum = logits.empty(by_expert, aoti_torch_dtype_float32());
  if (replay) read_ids(c, *replay, T, K, logits, ids.ptr<int64_t>());

  const int64_t blocks = (T + kBlock - 1) / kBlock;
  const int n_threads = threads(blocks);
  std::vector<float> probs(n_threads * padded);
  std::vector<int32_t> keys(n_threads * 2 * padded), block_counts(blocks * E);
  std::vector<double> block_sums(blocks * E);
  const auto kernel = routing_kernels().route_topk[static_cast<int>(dtype)];
#pragma omp parallel for num_threads(n_threads)
  for (int64_t b = 0; b < blocks; b++) {
    const int me = omp_get_thread_num();
    for (int64_t t = b * kBlock; t < std::min(T, (b + 1) * kBlock); t++) {
      const bool counted = !mask_T || mask_T[t];
      kernel({.logits = in[t],
              .bias = bias_E,
              .ids = ids.ptr<int64_t>() + t * K,
              .weights = weights.ptr<float>() + t * K,
              .prob_sum = counted ? &block_sums[b * E] : nullptr,
              .counts = counted ? &block_counts[b * E] : nullptr,
              .probs = &probs[me * padded],
              .keys = &keys[me * 2 * padded],
              .E = E,
              .K = K,
              .replay = replay.has_value(),
              .renormalize = renormalize});
    }
  }
  for (int64_t e = 0; e < E; e++) {
    int64_t count = 0;
    double total = 0;
    for (int64_t b = 0; b < blocks; b++) count += block_counts[b * E + e], total += block_sums[b * E + e];
    counts.ptr<int64_t>()[e] = count;
    prob_sum.ptr<float>()[e] = static_cast<float>(total);
  }
  return {std::move(weights), std::move(ids), std::move(counts), std::move(prob_sum)};
}

Tensor route_topk_backward(const OptTensor& grad_weights, const OptTensor& grad_prob_sum, const Tensor& logits,
                           const Tensor& ids, const OptTensor& mask, bool renormalize) {
  const Check c("route_topk_backward");
  const DType dtype = check_logits(c, logits);
  c.rank("ids_TK", ids, 2);
  const StridedRows in(c, "logits_TE", logits);
  const int64_t T = logits.size(0), E = logits.size(1), K = ids.size(1), padded = routing_padded(E);
  const float* dweights = check_floats(c, "grad_weights_TK", grad_weights, {T, K}, logits);
  const float* dsum = check_floats(c, "grad_prob_sum_E", grad_prob_sum, {E}, logits);
  const bool* mask_T = check_mask(c, mask, T, logits);
  std::vector<int64_t> checked_ids(T * K);
  read_ids(c, ids, T, K, logits, checked_ids.data());
  Tensor dlogits = logits.empty_like();
  const StridedRows out(c, "dlogits", dlogits);

  const int n_threads = threads((T + kBlock - 1) / kBlock);
  std::vector<float> padded_dsum(padded), scratch(n_threads * 2 * padded);
  if (dsum) std::copy_n(dsum, E, padded_dsum.begin());
  const auto kernel = routing_kernels().route_topk_backward[static_cast<int>(dtype)];
#pragma omp parallel for num_threads(n_threads)
  for (int64_t t = 0; t < T; t++) {
    float* mine = &scratch[omp_get_thread_num() * 2 * padded];
    kernel({.logits = in[t],
            .ids = checked_ids.data() + t * K,
            .grad_weights = dweights ? dweights + t * K : nullptr,
            .grad_prob_sum = dsum && (!mask_T || mask_T[t]) ? padded_dsum.data() : nullptr,
            .dlogits = out[t],
            .probs = mine,
            .dprobs = mine + padded,
            .E = E,
            .K = K,
            .renormalize = renormalize});
  }
  return dlogits;
}

const auto library = Library::impl("sail_ops", "CPU")
                         .kernel<route_topk>("route_topk")
                         .kernel<route_topk_backward>("route_topk_backward");
}  // namespace
}  // namespace sail::cpu
