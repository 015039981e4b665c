// Tile shapes of the attention kernels, by head dim: 64, 96 and 128; the heads between are filled up with zeros. No card
// has run them: the reasons are counted, not measured (docs/decisions.md, "Attention on NVIDIA GPUs").
#pragma once
#include "attention.h"

namespace sail::cuda::sm80 {
// Blocks of kM rows whose sums stay in registers, kM / Warps rows a warp, against steps of kN rows; kSlots tiles or pairs
// of tiles of those are in shared memory.
template <int D, int M, int N, int Warps, int Slots, int Blocks, int SharedBytes, bool Split = false>
struct AttentionShape {
  static constexpr int kD = D, kM = M, kN = N, kWarpM = M / Warps, kThreads = 32 * Warps, kSlots = Slots;
  static constexpr int kBlocks = Blocks;  // of a multiprocessor: bounds the registers
  static constexpr int kSharedBytes = SharedBytes;
  static constexpr bool kSplit = Split;
  static_assert(kWarpM % 16 == 0 && kN % 16 == 0 && D % 32 == 0);
  static_assert(kSharedBytes <= 99 * 1024, "sm_86 and sm_89 give a block 99 KB");
};
constexpr int head_bytes(int D) { return D % 64 ? D * 2 + 16 : D * 2; }  // of a row in shared memory, HeadTile::kPitch

// 32 rows a warp: a block of keys is read from shared memory once for two of mma's, 256 bytes for 4 clocks of mma.
template <int D> using ForwardShape = AttentionShape<D, 128, 64, 4, 3, 2, (128 + 3 * 64) * head_bytes(D)>;
// Bound by reading keys, not by products: 64 rows hold 8 queries of 8 heads.
template <int D> using DecodeShape = AttentionShape<D, 64, 64, 4, 3, 2, (64 + 3 * 64) * head_bytes(D), true>;

// Queries and their gradients' sums against pairs of keys and values, 32 at a time: with 64 the two products of scores
// would take 128 registers beside the sums.
template <int D>
using QueryGradShape = AttentionShape<D, 128, 32, 4, 2, D == 64 ? 2 : 1, (2 * 128 + 4 * 32) * head_bytes(D)>;
// Keys, values and two sums against pairs of queries and output gradients, whose lse and delta lie beside them. 16 keys a
// warp: the sums of 32 take 256 registers where D is 128, and with 64 they leave too few for the rest.
template <int D>
using KeyGradShape = AttentionShape<D, 128, 32, 8, 2, 1, (2 * 128 + 4 * 32) * head_bytes(D) + 2 * 32 * 8>;
}  // namespace sail::cuda::sm80
