// Tile shapes of the attention kernels, by head dim: 64, 96 and 128, with wgmma also 80; the heads between are filled up
// with zeros. No card has run them: the reasons are counted, not measured (docs/decisions/attention-cuda.md).
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

namespace sail::cuda::sm90 {
// Blocks of kGroups consumer warp groups with 64 queries each, against tiles of kN keys and as many values. Two groups at
// least: one computes probabilities while the other multiplies. 128 keys: scores, probabilities and 128 columns of sums
// are 160 registers of a thread.
template <int D, int Groups, int ProducerRegisters, int ConsumerRegisters> struct AttentionShape {
  static constexpr int kD = D, kPanels = (D + 63) / 64, kGroups = Groups, kM = 64 * Groups, kN = 128;
  static constexpr int kThreads = 128 * (1 + Groups), kSlots = 4;  // keys and values of two tiles
  static constexpr int kProducerRegisters = ProducerRegisters, kConsumerRegisters = ConsumerRegisters;
  static constexpr int kQueryBytes = kPanels * kM * 128, kTileBytes = kPanels * kN * 128;
  static_assert(D % 16 == 0 && 128 * (ProducerRegisters + Groups * ConsumerRegisters) <= 65536);
};
// Half of the products to an exponential where D is 64: a third group fills the gaps.
template <int D> struct ForwardShape : AttentionShape<D, 2, 40, 232> {};
template <> struct ForwardShape<64> : AttentionShape<64, 3, 32, 160> {};
}  // namespace sail::cuda::sm90
