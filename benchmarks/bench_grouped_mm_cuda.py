"""`grouped_mm` on an NVIDIA card beside `torch.nn.functional.grouped_mm`: both layouts forward, the weight gradient.

The products are the up-projection's of Qwen3-30B-A3B: R = T K rows in E groups as a uniform routing gives them,
[R, D] x [E, D, 2F].
"""

from statistics import median

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import sail_ops
from benchmarks import events, harness, rows
from benchmarks.cases import DTYPES, MoeCase, draw_routings, size_name
from benchmarks.limits import Limits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
BUDGET = 0.5  # seconds of rounds a row
TOKENS = 8192 if size_name() == "full" else 64
# w as [E, k, n] in memory, or the transposed view of a parameter [E, n, k]; its gradient is laid out as it is
CASES = [("forward", "kn"), ("forward", "nk"), ("weight gradient", "nk")]


class GroupedMmSteps:
    """The forward, or the backward for w alone of a forward that `prepare` has run."""

    def __init__(self, mode: str, layout: str, tokens: int, size: str, device: str = "cpu") -> None:
        case = MoeCase("bf16", "uniform", tokens, "forward", None, size)
        s, dtype = case.sizes, DTYPES[case.dtype]
        (ids_TK,) = draw_routings(case, 1)
        self.mode, shape = mode, (s.E, s.D, 2 * s.F)
        self.offsets_E = ids_TK.flatten().bincount(minlength=s.E).cumsum(0).int().to(device)
        self.x_RK, self.dy_RN = (
            torch.randn(ids_TK.numel(), width, device=device).to(dtype) for width in (s.D, 2 * s.F)
        )
        if layout == "kn":
            w_EKN = torch.empty(shape, device=device, dtype=dtype).normal_()
        else:
            w_EKN = torch.empty(s.E, 2 * s.F, s.D, device=device, dtype=dtype).normal_().transpose(1, 2)
        self.w_EKN = w_EKN.mul_(s.D**-0.5).requires_grad_(mode != "forward")
        self.flops = 2 * self.x_RK.numel() * 2 * s.F
        self.case = {"mode": mode, "layout": layout, "dtype": "bf16", "T": tokens} | vars(s)
        self.out: Tensor | None = None

    def prepare(self, name: str) -> None:
        """The forward whose backward is timed."""
        self.out = self.forward(name) if self.mode != "forward" else None

    def forward(self, name: str) -> Tensor:
        """[R, n]."""
        if name == "sail":
            return sail_ops.grouped_mm(self.x_RK, self.w_EKN, self.offsets_E)
        return F.grouped_mm(self.x_RK, self.w_EKN, offs=self.offsets_E)

    def result(self, name: str) -> Tensor:
        """What the step computes."""
        if self.out is None:
            return self.forward(name)
        return torch.autograd.grad(self.out, self.w_EKN, self.dy_RN)[0]

    def run(self, name: str) -> None:
        """One step."""
        self.result(name)


@pytest.mark.parametrize("mode, layout", CASES)
def test_grouped_mm(benchmark: BenchmarkFixture, mode: str, layout: str, cuda_limits: Limits) -> None:
    """One product, against torch's."""
    steps = GroupedMmSteps(mode, layout, TOKENS, size_name(), events.DEVICE)
    row = {"family": "grouped_mm", "kind": mode, "case": steps.case}
    samples, facts = rows.measure(benchmark, steps, ["torch"], budget=BUDGET, row=row)
    gflops = steps.flops / median(samples["sail"]) / 1e9
    harness.record(benchmark, samples, gflops=gflops, of_dense_mm=gflops / cuda_limits.dense_gflops["bf16"], **facts)
