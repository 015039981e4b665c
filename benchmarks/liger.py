"""liger-kernel as a peer: its functions with the arguments of ours, and transformers' layer as its patch leaves it.

Its kernels are Triton: without a card they are imported and called by signature alone. ImportError without the package.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.models.qwen3_moe import modeling_qwen3_moe

PATCHED = ("apply_rotary_pos_emb", "Qwen3MoeRMSNorm", "Qwen3MoeExperts")


def functions() -> Any:
    """liger_kernel.transformers.functional."""
    from liger_kernel.transformers import functional

    return functional


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Not in place: its backward would overwrite the gradient that comes from outside."""
    return functions().liger_rms_norm(x, weight, 1e-6, in_place=False)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The normed sum and the sum."""
    return functions().liger_fused_add_rms_norm(x, residual, weight, 1e-6, in_place=False)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As it comes."""
    return functions().liger_layer_norm(x, weight, bias, 1e-5)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """It has no fused one."""
    total = x + residual
    return layer_norm(total, weight, bias), total


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Its norm, then its rotation of [B, heads, tokens, head dim]."""
    heads_first = (t[None].transpose(1, 2) for t in (rms_norm(q, q_weight), rms_norm(k, k_weight)))
    q, k = functions().liger_rope(*heads_first, cos[None], sin[None])
    return q.transpose(1, 2)[0], k.transpose(1, 2)[0]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As it comes."""
    return functions().liger_swiglu(gate, up)


def linear_cross_entropy(hidden: Tensor, lm_head: Tensor, labels: Tensor) -> Tensor:
    """Chunked too, with its defaults."""
    return functions().liger_fused_linear_cross_entropy(hidden, lm_head, labels)


OPS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (rms_norm, add_rms_norm, layer_norm, add_layer_norm, qk_norm_rope, swiglu)
}


@contextmanager
def patched() -> Iterator[None]:
    """Inside, transformers' Qwen3-MoE is what `apply_liger_kernel_to_qwen3_moe` makes of it; it has no way back.

    Norms and experts are taken when a layer is made, the rotation when it is called.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe

    before = {name: getattr(modeling_qwen3_moe, name) for name in PATCHED}
    apply_liger_kernel_to_qwen3_moe(rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(modeling_qwen3_moe, name, value)
