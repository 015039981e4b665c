"""Fused operators for mixture-of-experts models: the public list, nothing else."""

from .activation import swiglu
from .loss import linear_cross_entropy
from .moe import fused_experts, grouped_experts, grouped_mm
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .reference import Routing
from .rope import qk_norm_rope, rope
from .routing import load_balancing_loss, route_topk

__all__ = [
    "Routing",
    "add_layer_norm",
    "add_rms_norm",
    "fused_experts",
    "grouped_experts",
    "grouped_mm",
    "layer_norm",
    "linear_cross_entropy",
    "load_balancing_loss",
    "qk_norm_rope",
    "rms_norm",
    "rope",
    "route_topk",
    "swiglu",
]
