"""`linear_cross_entropy` with both gradients beside `F.cross_entropy` on full logits: time, and the peak of memory."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import sail_ops
from benchmarks import harness, liger
from benchmarks.cases import DTYPES, size_name
from benchmarks.limits import Limits
from benchmarks.worker import Worker

SHAPES = {"full": (512, 1024, 151936), "tiny": (32, 64, 1000)}  # labeled tokens, hidden size, vocabulary of Qwen3


def full_logits(hidden: Tensor, lm_head: Tensor, labels: Tensor) -> Tensor:
    """transformers' loss of causal language models: logits in the model's dtype, the rest in fp32."""
    return F.cross_entropy(F.linear(hidden, lm_head).float(), labels)


def narrow_logits(hidden: Tensor, lm_head: Tensor, labels: Tensor) -> Tensor:
    """The softmax too in the model's dtype: less memory and time, a loss of three digits."""
    return F.cross_entropy(F.linear(hidden, lm_head), labels)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sail": sail_ops.linear_cross_entropy,
    "cross_entropy": full_logits,
    "cross_entropy_narrow": narrow_logits,
    "compiled": torch.compile(full_logits, dynamic=False),
    "liger": liger.linear_cross_entropy,
}
PEERS = ("cross_entropy", "cross_entropy_narrow", "compiled")  # a card has liger too


class LossSteps:
    """Forward and backward, gradients fresh in every step."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, int, int], device: str = "cpu"):
        T, D, V = shape
        self.hidden_TD = torch.randn(T, D, device=device).to(dtype).requires_grad_()
        self.lm_head_VD = (torch.randn(V, D, device=device) * D**-0.5).to(dtype).requires_grad_()
        self.labels_T = torch.randint(V, (T,), device=device)

    @property
    def flops(self) -> int:
        """Of three products: logits and both gradients."""
        return 6 * self.hidden_TD.numel() * len(self.lm_head_VD)

    def prepare(self, name: str) -> None:
        """Drop the gradients."""
        self.hidden_TD.grad = self.lm_head_VD.grad = None

    def run(self, name: str) -> None:
        """One step."""
        LOSSES[name](self.hidden_TD, self.lm_head_VD, self.labels_T).backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss(benchmark: BenchmarkFixture, dtype: str, limits: Limits, memory_worker: Worker) -> None:
    """A training step of head and loss; in fp32 both ways to `F.cross_entropy` are one."""
    size = size_name()
    steps = LossSteps(DTYPES[dtype], SHAPES[size])
    peers = [name for name in PEERS if dtype != "fp32" or name != "cross_entropy_narrow"]
    samples = harness.interleave(benchmark, steps, "sail", peers, budget=20.0 if size == "full" else 0.1)
    memory_worker.build(LossSteps, DTYPES[dtype], SHAPES[size])
    gradients = steps.hidden_TD.nbytes + steps.lm_head_VD.nbytes
    peaks = {}
    for name in samples:
        memory_worker.call("run", name)  # threads, libraries and compiled code are there before we look
        peaks[name] = memory_worker.call("peak_bytes", name) - gradients
    T, D, V = SHAPES[size]
    gflops = steps.flops / benchmark.stats.stats.median / 1e9
    harness.record(
        benchmark,
        samples,
        family="loss",
        kind="train",
        case={"dtype": dtype, "T": T, "D": D, "V": V},
        gflops=gflops,
        of_dense_mm=gflops / limits.dense_gflops[dtype],
        peak=peaks,
    )
