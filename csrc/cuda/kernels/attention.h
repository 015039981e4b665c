// Attention as data, torch-free: out = softmax(scale q k^T) v by head, and its gradients. bf16 or fp16 in, fp32 sums.
// Strides count elements. A pack's cu_seqlens lie in device memory: the host never knows the lengths, so a launch covers
// any split of the tokens and blocks find their rows on the device. Values that are no cu_seqlens are cut to what lies
// within the tensors. No float atomics: the same arguments give the same bits.
//
// B sequences, S queries and L keys of each (packed: of all together), H query heads, G key/value heads, D head dim,
// R = B * H * S rows of lse (packed: H * S).
#pragma once
#include "tile_scheduler.h"

namespace sail::cuda {
// Token t of head h, in batch b where tokens are not packed
struct HeadRows {
  const void* data;
  int64_t batch, token, head;
};

struct Attention {
  HeadRows q, k, v;            // rows of D contiguous elements, each on 16 bytes
  const int32_t *cu_q, *cu_k;  // [B + 1], or null: every sequence is as long
  int64_t B, S, L, H, G, D;
  float scale;
  bool causal;  // query i of nq sees the keys up to i + nk - nq of nk

  SAIL_HD int64_t rows() const { return (cu_q ? 1 : B) * H * S; }
};

struct AttentionForward : Attention {
  void* out;   // like q, contiguous
  float* lse;  // [B, H, S], packed [H, S]: log of the softmax's denominator, -inf where no key is seen
};

// Few queries against many keys: each block takes `chunk` keys, and attention_combine_kernel adds what they found.
struct AttentionDecode : AttentionForward {
  int64_t most_queries;  // of a sequence
  int64_t splits, chunk;
  float *partial_out, *partial_lse;  // [splits, R, D] and [splits, R], the latter in base 2
};

struct AttentionBackward : Attention {
  const void *dout, *out;   // like q, contiguous
  const float *lse, *dlse;  // like AttentionForward's; dlse may be null
  float* stats;             // [R, 2] to work in: lse in base 2, and sum(dout * out) - dlse
  void *dq, *dk, *dv;       // like q, k, v, contiguous
};

// The most blocks that `tokens` of B sequences can make, `rows` to a block, however they are split.
constexpr int64_t most_blocks(bool packed, int64_t B, int64_t tokens, int64_t rows) {
  return packed ? tokens / rows + (tokens < B ? tokens : B) : B * ceil_div(tokens, rows);
}

// Keys of a split: enough splits that all multiprocessors read keys twice over, none of fewer than `least` keys.
struct SplitPlan {
  int64_t splits, chunk;
};
constexpr SplitPlan plan_splits(int64_t keys, int64_t blocks, int sm_count, int64_t least) {
  const int64_t most = keys > least ? ceil_div(keys, least) : 1;
  const int64_t wanted = blocks ? ceil_div(2 * static_cast<int64_t>(sm_count), blocks) : 1;
  const int64_t splits = wanted < most ? wanted : most;
  const int64_t chunk = ceil_div(ceil_div(keys > 0 ? keys : 1, splits), least) * least;
  return {ceil_div(keys > 0 ? keys : 1, chunk), chunk};
}

// ---- launches; nothing synchronizes, everything may be captured into a graph
namespace sm80 {
void attention_forward(const AttentionForward& a, const Launch& launch);
void attention_decode(const AttentionDecode& a, const Launch& launch);
void attention_backward(const AttentionBackward& a, const Launch& launch);
}  // namespace sm80
namespace sm90 {
bool attention_forward(const AttentionForward& a, const Launch& launch);  // false: not for TMA, nothing was launched
}  // namespace sm90
}  // namespace sail::cuda
