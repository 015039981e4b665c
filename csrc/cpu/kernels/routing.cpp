// Softmax and top-k of one token's logits. Scratch rows are padded to whole vectors: -inf logits, so zero probability.
#include "routing.h"

#include "loop.h"

namespace sail::cpu::SAIL_ISA {
namespace {
inline int32_t max_lane(vi v) {
  int32_t t[W];
  memcpy(t, &v, sizeof v);
  int32_t m = t[0];
  for (int i = 1; i < W; i++) m = t[i] > m ? t[i] : m;
  return m;
}

inline vi load_keys(const int32_t* p) {
  vi v;
  memcpy(&v, p, sizeof v);
  return v;
}

// A NaN among the logits makes every probability NaN, as in torch.
template <class T> void softmax(const T* logits, float* probs, int64_t E) {
  const int64_t padded = routing_padded(E);
  for_vectors(E, [=](int64_t c, auto lanes) { store(probs + c, load(logits + c, lanes), lanes); });
  for (int64_t e = E; e < padded; e++) probs[e] = -INFINITY;
  vf m = set1(-INFINITY);
  for (int64_t c = 0; c < padded; c += W) m = vmax(m, load(probs + c));
  float lane[W], top = -INFINITY;
  memcpy(lane, &m, sizeof m);
  for (int i = 0; i < W; i++) top = lane[i] > top ? lane[i] : top;
  const vf total = sum_vectors<vf>(padded, [=](int64_t c, auto lanes, vf& acc) {
    const vf p = vexp(load(probs + c, lanes) - set1(top));
    store(probs + c, p, lanes);
    acc += p;
  });
  const vf denominator = set1(sum(total));
  for (int64_t c = 0; c < padded; c += W) store(probs + c, load(probs + c) / denominator);
}

// ids = the K largest of probs + bias, ties to the lower id, NaN above all (torch.sort's order). Works on integers that
// compare like the scores, on the best of each vector of them first: E/W + W steps an expert instead of E.
void top_k(const RouteRow& row) {
  constexpr int32_t kTaken = INT32_MIN;  // below the key of -inf
  const int64_t padded = routing_padded(row.E), vectors = padded / W;
  int32_t *keys = row.keys, *best = row.keys + padded;
  for_vectors(row.E, [=](int64_t c, auto lanes) {
    vf score = load(row.probs + c, lanes);
    if (row.bias) score += load(row.bias + c, lanes);
    const vi bits = reinterpret_cast<vi>(score);
    const vi key = score != score ? vi{} + INT32_MAX : bits ^ ((bits >> 31) & INT32_MAX);
    memcpy(keys + c, &key, sizeof key);  // the padding too
  });
  for (int64_t e = row.E; e < padded; e++) keys[e] = kTaken;
  for (int64_t v = 0; v < vectors; v++) best[v] = max_lane(load_keys(keys + v * W));
  for (int64_t k = 0; k < row.K; k++) {
    int64_t v = 0;
    for (int64_t i = 1; i < vectors; i++) v = best[i] > best[v] ? i : v;
    int64_t e = v * W;
    while (keys[e] != best[v]) e++;
    row.ids[k] = e;
    keys[e] = kTaken;
    best[v] = max_lane(load_keys(keys + v * W));
  }
}

template <class T> void route_topk_kernel(const RouteRow& row) {
  softmax(static_cast<const T*>(row.logits), row.probs, row.E);
  if (!row.replay) top_k(row);
  double total = 0;
  for (int64_t k = 0; k < row.K; k++) total += static_cast<double>(row.weights[k] = row.probs[row.ids[k]]);
  if (row.renormalize)
    for (int64_t k = 0; k < row.K; k++) row.weights[k] /= static_cast<float>(total);
  if (!row.prob_sum) return;
  for (int64_t e = 0; e < row.E; e++) row.prob_sum[e] += static_cast<double>(row.probs[e]);
  for (int64_t k = 0; k < row.K; k++) row.counts[row.ids[k]]++;
}

// The sums over K are fp64: dw - dot cancels.
// dp = grad_prob_sum + scatter(dweights), through w = p / sum(p) if renormalized; dlogits = p (dp - sum(p dp))
template <class T> void route_topk_backward_kernel(const RouteBackwardRow& row) {
  const int64_t padded = routing_padded(row.E);
  float *p = row.probs, *dp = row.dprobs;
  softmax(static_cast<const T*>(row.logits), p, row.E);
  for (int64_t c = 0; c < padded; c += W) store(dp + c, row.grad_prob_sum ? load(row.grad_prob_sum + c) : vf{});
  if (const float* dw = row.grad_weights) {
    double total = 1, dot = 0;
    if (row.renormalize) {
      total = 0;
      for (int64_t k = 0; k < row.K; k++) {
        const double pk = static_cast<double>(p[row.ids[k]]);
        total += pk, dot += static_cast<double>(dw[k]) * pk;
      }
      dot /= total;
    }
    for (int64_t k = 0; k < row.K; k++)
      dp[row.ids[k]] += static_cast<float>((static_cast<double>(dw[k]) - dot) / total);
  }
  const vf products = sum_vectors<vf>(
      padded, [=](int64_t c, auto lanes, vf& acc) { acc = fma(load(p + c, lanes), load(dp + c, lanes), acc); });
  const vf mean = set1(sum(products));
  for_vectors(row.E, [=](int64_t c, auto lanes) {
    store(static_cast<T*>(row.dlogits) + c, load(p + c) * (load(dp + c) - mean), lanes);
  });
}
}  // namespace

const RoutingKernels kRouting = {
    {route_topk_kernel<float>, route_topk_kernel<bf16>, route_topk_kernel<f16>},
    {route_topk_backward_kernel<float>, route_topk_backward_kernel<bf16>, route_topk_backward_kernel<f16>},
};
}  // namespace sail::cpu::SAIL_ISA
