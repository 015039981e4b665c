"""`linear_cross_entropy` on an NVIDIA card, beside `F.cross_entropy` on full logits, torch.compile and liger-kernel."""

from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import events, harness, rows
from benchmarks.bench_loss import PEERS, SHAPES, LossSteps
from benchmarks.cases import DTYPES, size_name
from benchmarks.limits import Limits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
BUDGET = 1.5  # seconds of rounds
SHAPE = (8192, 2048, 151936) if size_name() == "full" else SHAPES["tiny"]


def test_loss(benchmark: BenchmarkFixture, cuda_limits: Limits) -> None:
    """A training step of head and loss, and its peak of memory beside inputs and gradients."""
    steps = LossSteps(DTYPES["bf16"], SHAPE, events.DEVICE)
    row = {"family": "loss", "kind": "train", "case": {"dtype": "bf16", **dict(zip("TDV", SHAPE, strict=True))}}
    samples, facts = rows.measure(benchmark, steps, [*PEERS, "liger"], budget=BUDGET, row=row)
    gradients = steps.hidden_TD.nbytes + steps.lm_head_VD.nbytes
    gflops = steps.flops / median(samples["sail"]) / 1e9
    harness.record(
        benchmark,
        samples,
        gflops=gflops,
        of_dense_mm=gflops / cuda_limits.dense_gflops["bf16"],
        peak={name: rows.peak_memory(steps, name) - gradients for name in samples},
        **facts,
    )
