"""Fused operators for mixture-of-experts models: the public list, nothing else."""

from .norm import rms_norm

__all__ = ["rms_norm"]
