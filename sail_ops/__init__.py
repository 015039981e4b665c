"""Fused operators for mixture-of-experts models: the public list, nothing else."""

from .activation import swiglu
from .norm import add_rms_norm, rms_norm
from .reference import Routing
from .routing import load_balancing_loss, route_topk

__all__ = [
    "Routing",
    "add_rms_norm",
    "load_balancing_loss",
    "rms_norm",
    "route_topk",
    "swiglu",
]
