"""`linear` beside `F.linear`, forward and training: the rows that its rule (csrc/cpu/product.h) is read from.

Ours are timed in every dtype, also where the rule takes torch's: "taken" says which of the two `sail_ops.linear` is.
"""

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import harness
from benchmarks.cases import size_name
from benchmarks.limits import Limits
from sail_ops.linear import own_linear, torch_is_faster

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = {"full": (2048, 6144), "tiny": (64, 96)}  # inputs and outputs: hidden size and MLP of Qwen3-1.7B
# fp16 trains at 1 GFLOP/s by torch: few tokens
CASES = [(1, "forward"), (16, "forward"), (512, "forward"), (128, "train")]  # tokens, step
BUDGET = {"full": 4.0, "tiny": 0.02}  # seconds a row
LINEARS = {"sail": own_linear, "torch": F.linear}


class LinearSteps:
    """A forward, or a forward and backward with fresh gradients of x and the weight."""

    def __init__(self, dtype: torch.dtype, T: int, mode: str):
        inputs, outputs = SHAPES[size_name()]
        self.train = mode == "train"
        self.x_TK = torch.randn(T, inputs).to(dtype).requires_grad_(self.train)
        self.weight_NK = (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype).requires_grad_(self.train)
        self.grad_TN = torch.randn(T, outputs).to(dtype)

    @property
    def flops(self) -> int:
        """Of one product, or of three."""
        return (6 if self.train else 2) * self.x_TK.numel() * len(self.weight_NK)

    def prepare(self, name: str) -> None:
        """Drop the gradients."""
        self.x_TK.grad = self.weight_NK.grad = None

    def run(self, name: str) -> None:
        """One step."""
        y_TN = LINEARS[name](self.x_TK, self.weight_NK, None)
        if self.train:
            y_TN.backward(self.grad_TN)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, mode", CASES, ids=lambda value: str(value))
def test_linear(benchmark: BenchmarkFixture, dtype: str, T: int, mode: str, limits: Limits) -> None:
    """One layer; its rate beside that of dense mm in fp32, which every CPU has."""
    steps = LinearSteps(DTYPES[dtype], T, mode)
    samples = harness.interleave(benchmark, steps, "sail", ["torch"], budget=BUDGET[size_name()])
    inputs, outputs = SHAPES[size_name()]
    seconds = benchmark.stats.stats.median
    harness.record(
        benchmark,
        samples,
        family="linear",
        kind=mode,
        case={"dtype": dtype, "T": T, "mode": mode, "K": inputs, "N": outputs},
        taken="torch" if torch_is_faster(DTYPES[dtype], steps.x_TK, steps.weight_NK) else "sail",
        gflops=steps.flops / seconds / 1e9,
        of_dense_mm_fp32=steps.flops / seconds / 1e9 / limits.dense_gflops["fp32"],
        of_read_bandwidth=steps.weight_NK.nbytes / seconds / 1e9 / limits.read_gb_s,
    )
