"""A module like flash-attn 2.8: its signatures and what it returns, computed by the reference."""

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sail_ops import reference

CALLS: list[dict[str, Any]] = []  # the options of every call


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    CALLS.append({"deterministic": deterministic, "dropout": dropout_p})
    out, lse = reference.attention(q, k, v, causal=causal, softmax_scale=softmax_scale, return_lse=True)
    return answer(out, lse, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    CALLS.append({"longest": (max_seqlen_q, max_seqlen_k)})
    pack = q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    out, lse = reference.attention_varlen(*pack, causal=causal, softmax_scale=softmax_scale, return_lse=True)
    return answer(out, lse, return_attn_probs)


def answer(out: Tensor, lse: Tensor, with_lse: bool) -> Tensor | tuple[Tensor, Tensor, None]:
    """As flash-attn: +inf where no key is seen, and a third result that is empty."""
    return (out, torch.where(lse == -math.inf, math.inf, lse), None) if with_lse else out


def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`import flash_attn` finds it."""
    module: Any = ModuleType("flash_attn")
    module.__version__ = "2.8.3"
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    CALLS.clear()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module
