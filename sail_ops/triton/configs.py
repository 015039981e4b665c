"""Tile sizes by problem and card: a table instead of autotuning, which would time dozens of kernels in every rank of a
training job, and choose differently from run to run.

The reasons given are those of the choice: no card has run these kernels yet, and nothing was tuned.
"""

from typing import NamedTuple

import torch

GROUP = 8  # row tiles that walk over the columns together: their rows (4 MB at D = 2048) and one column stay in L2
GATED = 2  # a gated tile has half the columns: two accumulators, or one beside gate, up and what comes of them


class Tiles(NamedTuple):
    """A program's output tile [BM, BN], the depth BK of one step, and how the program runs."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int

    def gated(self) -> "Tiles":
        return self._replace(BN=self.BN // GATED)


# Rows of a tile against the mean number of an expert's rows: no more than these, or most of a tile would be empty.
_BM = (16, 32, 64, 128)

# 128 x 128 with 8 warps: 64 accumulators a thread leave room for an epilogue without spills. A stage of 16-bit operands
# takes (BM + BN) * BK * 2 bytes of shared memory. With few rows the weights' stream is the bound: more stages of it.
_SM_80 = {  # 163 KB a multiprocessor; two programs on it hide each other's prologues
    16: Tiles(16, 128, 64, 4, 4),
    32: Tiles(32, 128, 64, 4, 4),
    64: Tiles(64, 128, 64, 4, 3),
    128: Tiles(128, 128, 32, 8, 4),
}
_SM_90 = {  # 227 KB; a wgmma reads operands of depth 64 in one row of its 128-byte swizzle
    16: Tiles(16, 128, 128, 4, 4),
    32: Tiles(32, 128, 64, 4, 4),
    64: Tiles(64, 128, 64, 4, 4),
    128: Tiles(128, 128, 64, 8, 3),
}
_SMALL = {  # 99 KB (sm_86, sm_89, sm_120)
    16: Tiles(16, 128, 64, 4, 4),
    32: Tiles(32, 128, 64, 4, 4),
    64: Tiles(64, 128, 64, 4, 3),
    128: Tiles(128, 128, 32, 8, 3),
}
# fp32 goes through ordinary multiply-adds (TF32 would break the accuracy rule), whose operands sit in registers
_FP32 = {bm: Tiles(min(bm, 64), 64, 32, 8, 2) for bm in _BM}


def rows_tiles(capability: tuple[int, int], dtype: torch.dtype, rows: int, experts: int) -> Tiles:
    """Of the products whose output has a row for every routed row."""
    mean = rows // max(experts, 1)
    bm = next((b for b in _BM if b >= mean), _BM[-1])
    if dtype == torch.float32:
        return _FP32[bm]
    table = {(8, 0): _SM_80, (8, 7): _SM_80, (9, 0): _SM_90, (10, 0): _SM_90, (10, 3): _SM_90}.get(capability, _SMALL)
    return table[bm]


def weight_tiles(capability: tuple[int, int], dtype: torch.dtype, rows: int, experts: int) -> Tiles:
    """Of the products that sum over an expert's rows: the tile is the weight's, the depth is of rows."""
    tiles = rows_tiles(capability, dtype, 128 * experts, experts)
    mean = rows // max(experts, 1)
    depth = next((b for b in (16, 32, 64) if b >= mean), 64)  # deeper steps would be mostly empty
    return tiles._replace(BK=min(depth, tiles.BK))
