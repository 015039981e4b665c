"""`rms_norm`, `add_rms_norm` and `swiglu`, forward and backward, beside torch's functions and a copy's bandwidth."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import sail_ops
from benchmarks import harness
from benchmarks.cases import DTYPES, size_name
from benchmarks.limits import Limits

SHAPES = {"full": (4096, 2048), "tiny": (16, 64)}  # tokens of a micro-batch, hidden size
TRAFFIC = {"rms_norm": 5, "add_rms_norm": 8, "swiglu": 8}  # tensors [T, D] read or written, forward and backward


def torch_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As a transformer layer without fusion has it."""
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, 1e-6), total


OPS: dict[str, dict[str, Callable[..., Tensor | tuple[Tensor, Tensor]]]] = {
    "rms_norm": {"sail": sail_ops.rms_norm, "torch": lambda x, w: F.rms_norm(x, w.shape, w, 1e-6)},
    "add_rms_norm": {"sail": sail_ops.add_rms_norm, "torch": torch_add_rms_norm},
    "swiglu": {"sail": sail_ops.swiglu, "torch": lambda gate, up: F.silu(gate) * up},
}


class NormSteps:
    """Forward and backward of one operator, gradients fresh in every step."""

    def __init__(self, op: str, dtype: torch.dtype, size: str):
        self.op, shape = op, SHAPES[size]
        tensors = [torch.randn(shape) for _ in range(1 if op == "rms_norm" else 2)]
        tensors += [] if op == "swiglu" else [torch.rand(shape[-1])]
        self.inputs = [t.to(dtype).requires_grad_() for t in tensors]
        self.upstream = [torch.randn(shape).to(dtype) for _ in range(2 if op == "add_rms_norm" else 1)]

    def prepare(self, name: str) -> None:
        """Drop the gradients."""
        for tensor in self.inputs:
            tensor.grad = None

    def run(self, name: str) -> None:
        """One step."""
        out = OPS[self.op][name](*self.inputs)
        torch.autograd.backward(out if isinstance(out, tuple) else (out,), self.upstream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_norm(benchmark: BenchmarkFixture, op: str, dtype: str, limits: Limits) -> None:
    """A training step of one operator."""
    size = size_name()
    samples = harness.interleave(benchmark, NormSteps(op, DTYPES[dtype], size), "sail", ["torch"], budget=1.0)
    tokens, hidden = SHAPES[size]
    traffic = TRAFFIC[op] * tokens * hidden * DTYPES[dtype].itemsize / benchmark.stats.stats.median / 1e9
    case = {"op": op, "dtype": dtype, "T": tokens, "D": hidden}
    harness.record(
        benchmark, samples, family="norm", kind="train", case=case, gb_s=traffic, of_copy=traffic / limits.copy_gb_s
    )
