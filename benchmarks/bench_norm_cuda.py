"""Norms, rotary embedding and `swiglu` on an NVIDIA card, beside torch's functions, torch.compile and liger-kernel."""

from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import events, graphs, harness, rows
from benchmarks.bench_norm import OPS, SHAPES, NormSteps, Shape, peers_of
from benchmarks.cases import DTYPES, size_name

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
BUDGET = 0.3  # seconds of rounds a row
CUDA_SHAPES: list[Shape] = [(16384, 2048), (16384, 4096)] if size_name() == "full" else [SHAPES["tiny"]]
# heads of 128 are no wider at another hidden size
CASES = [(op, shape) for op in OPS for shape in CUDA_SHAPES if op != "qk_norm_rope" or shape == CUDA_SHAPES[0]]


@pytest.mark.usefixtures("cuda_limits")
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("op, shape", CASES, ids=[f"{op}-{shape[1]}" for op, shape in CASES])
def test_norm(benchmark: BenchmarkFixture, op: str, shape: Shape, graph: bool) -> None:
    """A training step of one operator, launched or replayed as a CUDA graph."""
    steps = NormSteps(op, DTYPES["bf16"], shape, events.DEVICE)
    timed = graphs.Replays(steps) if graph else steps
    case = {"op": op, "dtype": "bf16", "T": shape[0], "D": shape[1], "graph": graph}
    row = {"family": "norm", "kind": "train", "case": case}
    samples, facts = rows.measure(benchmark, timed, [*peers_of(op), "liger", "copy"], budget=BUDGET, row=row)
    ours = median(samples["sail"])
    rates = {"gb_s": steps.traffic / ours / 1e9, "of_copy": median(samples["copy"]) / ours}
    harness.record(benchmark, samples, **rates, **facts)
