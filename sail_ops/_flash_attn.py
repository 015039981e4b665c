"""SAIL_OPS_ATTENTION=flash_attn: attention of CUDA tensors by the flash-attn package, in place of our kernels."""

import math
import os
from typing import Any

import torch
from torch import Tensor

CHOICES = ("sail", "flash_attn")
ASKED = os.environ.get("SAIL_OPS_ATTENTION", "sail")
LEAST = (2, 6)  # from there on lse of a pack is [H, T]
DEVICE = "cuda"


def asked() -> bool:
    """Whether flash-attn was asked for; ValueError where something unknown was."""
    if ASKED not in CHOICES:
        raise ValueError(f"SAIL_OPS_ATTENTION: got {ASKED!r}, expected one of {', '.join(CHOICES)}")
    return ASKED == "flash_attn"


def takes(q: Tensor) -> bool:
    """Whether this call goes to flash-attn."""
    return asked() and q.device.type == DEVICE and q.dtype in (torch.bfloat16, torch.float16)


def describe() -> str:
    """For `python -m sail_ops`; ValueError where what was asked for is not to be had."""
    if asked():
        return f"flash_attn {package().__version__} (SAIL_OPS_ATTENTION=flash_attn)"
    return "sail_ops' kernels (SAIL_OPS_ATTENTION=flash_attn: the flash-attn package's)"


def package() -> Any:
    """The flash_attn module; ValueError where there is none to use."""
    try:
        import flash_attn
    except ImportError as error:
        raise ValueError(
            f"SAIL_OPS_ATTENTION: got 'flash_attn', which cannot be imported here ({error}): install flash-attn, or"
            " leave the variable unset for sail_ops' own kernels"
        ) from error
    found = tuple(int(part) for part in flash_attn.__version__.split(".")[:2])
    if found < LEAST:
        raise ValueError(f"SAIL_OPS_ATTENTION: got flash_attn {flash_attn.__version__}, expected 2.6 or newer")
    return flash_attn


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """`sail_ops.attention` by `flash_attn_func`."""
    return _results(package().flash_attn_func(q, k, v, **_options(scale, causal, return_lse)), return_lse)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """`sail_ops.attention_varlen` by `flash_attn_varlen_func`."""
    args = q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return _results(package().flash_attn_varlen_func(*args, **_options(scale, causal, return_lse)), return_lse)


def _options(scale: float, causal: bool, return_lse: bool) -> dict[str, Any]:
    return {
        "softmax_scale": scale,
        "causal": causal,
        "deterministic": torch.are_deterministic_algorithms_enabled(),  # its default adds up dq in any order
        "return_attn_probs": return_lse,
    }


def _results(results: Any, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """What it returns is out, or out, lse and the probabilities, which it leaves empty without dropout."""
    if not return_lse:
        return results
    out, lse, _ = results
    return out, _LseWithoutGradient.apply(lse)


class _LseWithoutGradient(torch.autograd.Function):
    """lse with -inf where no key is seen, for which flash-attn has +inf; its backward would drop lse's gradient."""

    @staticmethod
    def forward(ctx: Any, lse: Tensor) -> Tensor:
        return lse.masked_fill(lse == math.inf, -math.inf)

    @staticmethod
    def backward(ctx: Any, dlse: Tensor) -> Tensor:
        raise RuntimeError(
            "sail_ops.attention: lse: got a gradient, which flash_attn (SAIL_OPS_ATTENTION) has no backward for; use"
            " sail_ops' own kernels, or detach lse"
        )
