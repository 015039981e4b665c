"""Fused operators for mixture-of-experts models: the public list, nothing else."""

from ._backends import supports
from ._library import empty_cache
from .activation import swiglu
from .attention import attention, attention_varlen
from .linear import linear
from .loss import linear_cross_entropy
from .moe import fused_experts, grouped_experts, grouped_mm
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .rope import qk_norm_rope, rope
from .routing import load_balancing_loss, route_topk
from .types import Routing

__all__ = [
    "Routing",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_varlen",
    "empty_cache",
    "fused_experts",
    "grouped_experts",
    "grouped_mm",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "load_balancing_loss",
    "qk_norm_rope",
    "rms_norm",
    "rope",
    "route_topk",
    "supports",
    "swiglu",
]
