"""Portable GPU kernels: expert layer, grouped product, router, SwiGLU and RMSNorm in Triton, for cards without compiled
ones. Not LayerNorm, rotary embedding, attention or the loss: csrc/torch/schemas.cpp lists all operators.

Used where the CUDA library is absent or has no code for the card (sail_ops/_backends.py). Same semantics as the CPU's.
Nothing synchronizes with the host, no atomics: CUDA graphs can hold every op, and results are the same bits every time.
"""

from .activation import swiglu, swiglu_backward
from .grouped_mm import grouped_mm, grouped_mm_backward
from .moe import fused_experts, grouped_experts
from .moe_backward import fused_experts_backward, grouped_experts_backward
from .norm import add_rms_norm, rms_norm, rms_norm_backward
from .routing import route_topk, route_topk_backward

__all__ = [
    "add_rms_norm",
    "fused_experts",
    "fused_experts_backward",
    "grouped_experts",
    "grouped_experts_backward",
    "grouped_mm",
    "grouped_mm_backward",
    "rms_norm",
    "rms_norm_backward",
    "route_topk",
    "route_topk_backward",
    "swiglu",
    "swiglu_backward",
]
