"""The sum of partial results over programs."""

from torch import Tensor

from .kernels.sums import column_sums_kernel
from .launch import blocks, launch, power_of_two

_ROWS, _COLUMNS = 64, 64  # 16 KB a step: few columns keep many programs busy on a [1024, 2048] partial result


def column_sums(partial: Tensor, out: Tensor) -> None:
    """out[n] = sum over r of partial[r, n]; zeros where there are no rows"""
    rows, N = partial.shape
    block = power_of_two(N, 16, _COLUMNS)
    launch(column_sums_kernel, (blocks(N, block),), partial, out, rows, N, BLOCK_R=_ROWS, BLOCK=block)
