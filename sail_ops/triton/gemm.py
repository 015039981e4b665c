"""Launches of the grouped GEMMs."""

from torch import Tensor

from . import configs
from .kernels import gemm as kernels
from .launch import blocks, capability, launch
from .rows import Rows, RowTiles


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    rows: Rows,
    row_tiles: RowTiles,
    tiles: configs.Tiles,
    *,
    b_second: Tensor | None = None,
    bias: Tensor | None = None,
    weighted: bool = False,
    zero_tail: bool = False,
) -> None:
    """out[r] = (a[r] . b[e] + bias[e]) * weight[r]; b [E, K, N] by its strides. With b_second, which has b's strides,
    a's columns are two halves, and the second is multiplied by it."""
    E, K, N = b.shape
    launch(
        kernels.gemm_kernel,
        (row_tiles.total * blocks(N, tiles.BN),),
        a,
        a.stride(0),
        b,
        b_second,
        *b.stride(),
        bias,
        rows.weights if weighted else None,
        out,
        rows.offsets,
        row_tiles.expert,
        row_tiles.row,
        row_tiles.total,
        rows.total,
        K,
        N,
        E,
        ZERO_TAIL=zero_tail,
        EVEN_K=K % tiles.BK == 0,
        **constants(tiles),
    )


def weight_gradient(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    rows: Rows,
    *,
    gather_a: bool = False,
    gather_b: bool = False,
    accumulate: bool = False,
) -> None:
    """out[e] (+)= a^T . b over the expert's rows; `gather`: the operand has tokens, not rows. out [E, M, N] may have
    any stride between experts."""
    E, M, N = out.shape
    tiles = configs.weight_tiles(capability(a.device), a.dtype, rows.total, E)
    launch(
        kernels.weight_gradient_kernel,
        (E * blocks(M, tiles.BM) * blocks(N, tiles.BN),),
        a,
        a.stride(0),
        rows.order if gather_a else None,
        b,
        b.stride(0),
        rows.order if gather_b else None,
        rows.top_k,
        out,
        out.stride(0),
        rows.offsets,
        M,
        N,
        ACCUMULATE=accumulate,
        **constants(tiles),
    )


def constants(tiles: configs.Tiles) -> dict[str, int | str]:
    """What every GEMM kernel is compiled for."""
    return {
        "BM": tiles.BM,
        "BN": tiles.BN,
        "BK": tiles.BK,
        "GROUP": configs.GROUP,
        "PRECISION": "ieee",  # of fp32 operands; TF32 would break the accuracy rule
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
