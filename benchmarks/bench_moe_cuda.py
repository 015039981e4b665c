"""`fused_experts` on an NVIDIA card, beside transformers, torch.compile and liger-kernel on the same weights.

Times are the device's (CUDA events), medians of interleaved rounds with a cold second-level cache; peak memory of a
step beside each. Run one with `-k "full and T8192 and train and uniform"`.
"""

from importlib.util import find_spec
from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import events, harness
from benchmarks.cases import MoeCase, cuda_cases
from benchmarks.layer import Layer
from benchmarks.limits import Limits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
BUDGET = 1.0  # seconds of rounds a row
NOT_MEASURED = {"sonicmoe": "needs an environment of its own: it pins torch <= 2.9.1"}


def peers_of(case: MoeCase) -> list[str]:
    """Those that are installed. The stock loop trains at one size alone: 0.3 s a step, an artefact (bench_moe.py)."""
    peers = ["grouped_mm", "grouped_mm_compiled", "eager_unbind"]
    if find_spec("liger_kernel"):
        peers.append("liger")
    if case.mode == "forward" or (case.T == 8192 and case.routing == "uniform"):
        peers.append("stock_eager")
    if case.mode == "train":
        peers.append("sail_recompute")
    return peers


@pytest.mark.parametrize("case", cuda_cases(), ids=lambda case: case.id)
def test_fused_experts(benchmark: BenchmarkFixture, case: MoeCase, cuda_limits: Limits) -> None:
    """Forward, or forward and backward for x, both weights and the routing weights."""
    steps = Layer(case)
    failed = {name: why for name in peers_of(case) if (why := events.failure(steps, name))}
    peers = [name for name in peers_of(case) if name not in failed]
    samples = events.interleave(benchmark, steps, "sail", peers, budget=BUDGET)
    harness.record(
        benchmark,
        samples,
        **cuda_limits.rates(case, steps.hit, median(samples["sail"])),
        peak_bytes={name: events.peak_memory(steps, name) for name in ("sail", *peers)},
        not_measured=NOT_MEASURED | ({} if find_spec("liger_kernel") else {"liger": "not installed"}) | failed,
    )
