"""Fused operators for mixture-of-experts models: the public list, nothing else."""

from .activation import swiglu
from .attention import attention, attention_varlen
from .moe import fused_experts, grouped_experts, grouped_mm
from .norm import add_rms_norm, rms_norm
from .reference import Routing
from .routing import load_balancing_loss, route_topk

__all__ = [
    "Routing",
    "add_rms_norm",
    "attention",
    "attention_varlen",
    "fused_experts",
    "grouped_experts",
    "grouped_mm",
    "load_balancing_loss",
    "rms_norm",
    "route_topk",
    "swiglu",
]
