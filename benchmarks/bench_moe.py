"""`fused_experts` at Qwen3-30B-A3B's expert layer, beside transformers' implementations on the same weights.

A row is a case: pytest-benchmark's own columns are ours, `extra_info` has the peers, interleaved with ours round by
round, and the limits of the machine. Run one with `-k "bf16 and T128 and train and uniform"`.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import harness
from benchmarks.cases import MoeCase, moe_cases, size_name
from benchmarks.layer import Layer
from benchmarks.limits import Limits
from benchmarks.worker import RemoteLayer, Worker

BUDGET = {"full": 2.0, "tiny": 0.02}  # seconds a row, after warm-up; three rounds where they take longer
ARTEFACT = MoeCase("bf16", "uniform", 256, "train", "fresh", size_name())


def peers_of(case: MoeCase) -> list[str]:
    """Stock eager trains in one row alone (below); our own variants run where dW is in place."""
    peers = ["grouped_mm", "eager_unbind"]
    if case.mode == "forward":
        return [*peers, "stock_eager"]
    if case.gradients == "in_place" and case.routing == "uniform":
        peers += ["sail_overwrite"]
    if case.gradients == "in_place" and case.routing == "uniform" and case.T == 512:
        peers += ["sail_recompute"] + ["sail_fp32_grads"] * (case.dtype == "bf16")
    return peers


@pytest.mark.parametrize("case", moe_cases(), ids=lambda case: case.id)
def test_fused_experts(
    benchmark: BenchmarkFixture, case: MoeCase, limits: Limits, request: pytest.FixtureRequest
) -> None:
    """Forward, or forward and backward, against all peers."""
    if case.gradients == "huge_pages":
        worker: Worker = request.getfixturevalue("huge_page_worker")  # started by the first row that needs it
        steps: Layer | RemoteLayer = worker.layer(case)
    else:
        steps = Layer(case)
    samples = harness.interleave(benchmark, steps, "sail", peers_of(case), budget=BUDGET[case.size])
    seconds = benchmark.stats.stats.median
    harness.record(benchmark, samples, **limits.rates(case, steps.hit, seconds))


@pytest.mark.parametrize("case", [ARTEFACT], ids=lambda case: f"{case.id}-stock-eager-artefact")
def test_stock_eager(benchmark: BenchmarkFixture, case: MoeCase, limits: Limits) -> None:
    """Training through the stock loop, once: an artefact, as each W[e] builds a zero gradient of W's full size."""
    steps = Layer(case)
    harness.timed(steps, "sail")
    samples = harness.interleave(benchmark, steps, "sail", ["stock_eager"], budget=0, warm_up=False)
    seconds = benchmark.stats.stats.median
    harness.record(benchmark, samples, **limits.rates(case, steps.hit, seconds))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_memory(benchmark: BenchmarkFixture, dtype: str, memory_worker: Worker) -> None:
    """Bytes saved for backward and the transient peak of a training step, measured, beside the design's formula."""
    case = MoeCase(dtype, "uniform", 1024, "train", "in_place", size_name())
    layer = memory_worker.layer(case)
    names = ("sail", "sail_recompute", "grouped_mm", "eager_unbind")
    benchmark.extra_info.update(
        family="moe", kind="memory", case=vars(case), memory={name: layer.memory(name) for name in names}
    )
    benchmark.pedantic(layer.run, ("sail",), setup=lambda: layer.prepare("sail"))
