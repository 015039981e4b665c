"""`fused_experts` on an NVIDIA card, beside transformers, torch.compile and liger-kernel on the same weights.

Times are the device's (CUDA events), medians of interleaved rounds with a cold second-level cache; peak memory of a
step beside each; where tokens are few, replays of CUDA graphs too. Run one with
`-k "full and T8192 and train and uniform"`.
"""

import os
from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import events, graphs, harness, rows
from benchmarks.cases import MoeCase, cuda_cases
from benchmarks.layer import Layer
from benchmarks.limits import Limits
from sail_ops import _library

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
BUDGET = 1.0  # seconds of rounds a row
NOT_MEASURED = {"sonicmoe": "needs an environment of its own: it pins torch <= 2.9.1"}


def peers_of(case: MoeCase) -> list[str]:
    """The stock loop trains at one size alone, and what torch.compile makes is compiled for that size alone: a graph
    for inference and one for training. A replay has no peers that wait for the device."""
    if case.graph:
        return ["grouped_mm"]
    peers = ["grouped_mm", "eager_unbind", "liger"]
    chosen = case.T == 8192 and case.routing == "uniform" and case.size == "full"
    if chosen:
        peers.append("grouped_mm_compiled")
    if case.mode == "forward" or chosen:
        peers.append("stock_eager")
    if case.mode == "train":
        peers.append("sail_recompute")
    if case.T * case.sizes.K >= 2 * 128 * case.sizes.E:  # choose_pairs, csrc/cuda/kernels/gemm_config.h
        peers.append("sail_cluster")
    return peers


class CardLayer(Layer):
    """A layer whose row `sail_cluster` is ours under SAIL_OPS_CUDA_KERNELS=cluster."""

    def prepare(self, name: str) -> None:
        """`Layer.prepare`, and the kernels that the step will use."""
        if name == "sail_cluster" and events.DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0):
            raise RuntimeError("clusters are for compute capability 9.0")
        if name == "sail_cluster" or _library.HAS_CUDA:
            asked = os.environ.get("SAIL_OPS_CUDA_KERNELS", "")
            _library.set_cuda_kernels("cluster" if name == "sail_cluster" else asked)
        super().prepare(name)


@pytest.mark.parametrize("case", cuda_cases(), ids=lambda case: case.id)
def test_fused_experts(benchmark: BenchmarkFixture, case: MoeCase, cuda_limits: Limits) -> None:
    """Forward, or forward and backward for x, both weights and the routing weights."""
    steps = CardLayer(case)
    timed = graphs.Replays(steps) if case.graph else steps
    row = {"family": "moe", "kind": case.mode, "case": vars(case) | vars(case.sizes)}
    samples, facts = rows.measure(benchmark, timed, peers_of(case), budget=BUDGET, row=row)
    facts |= cuda_limits.rates(case, steps.hit, median(samples["sail"]))
    if not case.graph:
        facts["not_measured"] |= NOT_MEASURED
        facts["peak_bytes"] = {name: rows.peak_memory(steps, name) for name in samples}
    harness.record(benchmark, samples, **facts)
