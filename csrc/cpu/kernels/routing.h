// Kernels of the router: one token a call. Indexed by DType (of the logits).
#pragma once
#include "../isa.h"

namespace sail::cpu {
// Scratch rows hold E floats or keys, rounded up to whole vectors of any instruction set.
inline int64_t routing_padded(int64_t E) { return (E + 15) / 16 * 16; }

struct RouteRow {
  const void* logits;  // [E]
  const float* bias;   // [E] or null
  int64_t* ids;        // [K]: written, or read if `replay`
  float* weights;      // [K]
  double* prob_sum;    // [E], added to; null: the token is left out of the statistics
  int32_t* counts;     // [E], likewise
  float* probs;        // [padded E], scratch
  int32_t* keys;       // [2 * padded E], scratch
  int64_t E, K;
  bool replay, renormalize;
};

struct RouteBackwardRow {
  const void* logits;          // [E]
  const int64_t* ids;          // [K], each in [0, E)
  const float* grad_weights;   // [K] or null
  const float* grad_prob_sum;  // [padded E] or null
  void* dlogits;               // [E]
  float *probs, *dprobs;       // [padded E], scratch
  int64_t E, K;
  bool renormalize;
};

struct RoutingKernels {
  void (*route_topk[3])(const RouteRow& row);
  void (*route_topk_backward[3])(const RouteBackwardRow& row);
};
#define X(name) SAIL_DECLARE_TABLE(name, RoutingKernels, kRouting)
SAIL_FOR_EACH_ISA(X)
#undef X

inline const RoutingKernels& routing_kernels() {
#define X(name) SAIL_TABLE_ADDRESS(name, kRouting)
  static const RoutingKernels* const tables[] = {SAIL_FOR_EACH_ISA(X)};
#undef X
  return *tables[static_cast<int>(active_isa())];
}
}  // namespace sail::cpu
