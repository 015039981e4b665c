// The card that a call runs on: what it can do, and whether this library has code for it.
#pragma once
#include "../torch/checks.h"
#include "kernels/grouped_gemm.h"

namespace sail::cuda {
struct Card {
  int major, minor;  // compute capability
  int sm_count;
  int64_t shared_limit;  // bytes of shared memory that a block may have
};

// Throws where the library has no code for the tensor's card: naming the card, what was built, and how to build for it.
Card card_of(const Check& c, const Tensor& t);

// Whether a library built for `archs` ("80,90a") runs on a card: same major version, minor at most the card's, and
// with a letter ("90a") exactly that card.
constexpr bool has_code(const char* archs, int major, int minor) {
  for (const char* p = archs; *p;) {
    int number = 0;
    for (; *p >= '0' && *p <= '9'; p++) number = number * 10 + (*p - '0');
    const bool exact = *p && *p != ',';
    while (*p && *p != ',') p++;
    if (*p) p++;
    if (number / 10 == major && (exact ? number % 10 == minor : number % 10 <= minor)) return true;
  }
  return false;
}

// The grouped GEMM (and attention's forward) for this card: wgmma and TMA on compute capability 9.0 where the problem's
// alignment allows, otherwise mma.sync and cp.async. SAIL_OPS_CUDA_KERNELS=sm80 takes the latter everywhere, to compare.
bool prefers_sm90(const Card& card);
bool prefers_clusters(const Card& card);  // of two blocks, where they may pay: SAIL_OPS_CUDA_KERNELS=cluster
bool prefers_cutlass(const Card& card);   // grouped_mm alone, SAIL_OPS_CUDA_KERNELS=cutlass
template <class Problem, class Output>
void grouped_gemm(const Card& card, const Problem& p, const Output& out, const Launch& launch) {
#ifdef SAIL_CUDA_SM90
  if (prefers_sm90(card) && sm90::grouped_gemm(p, out, launch)) return;
#endif
  (void)card;
  sm80::grouped_gemm(p, out, launch);
}
}  // namespace sail::cuda
