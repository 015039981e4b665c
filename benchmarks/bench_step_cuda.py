"""One decoder layer of Qwen3-30B-A3B on an NVIDIA card, beside transformers' own and the same with liger-kernel.

As bench_step.py. Both peers' attention is SDPA under the mask of the pack, which is what transformers does by default.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import events, harness, rows
from benchmarks.bench_attention import RAGGED
from benchmarks.bench_step import LENGTHS, PARTS, LayerSteps
from benchmarks.cases import size_name
from benchmarks.limits import Limits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
BUDGET = 2.0  # seconds of rounds for the parts, and for the layers
TOKENS = (8192, 32768) if size_name() == "full" else (sum(LENGTHS["tiny"]),)


def pack(tokens: int) -> tuple[int, ...]:
    """Sequences of so many tokens together."""
    whole, rest = divmod(tokens, sum(RAGGED))
    return RAGGED * whole + (rest,) * (rest > 0)


@pytest.mark.parametrize("tokens", TOKENS)
def test_decoder_layer(benchmark: BenchmarkFixture, tokens: int, cuda_limits: Limits) -> None:
    """The layers, our and transformers' parts one by one, and the peak of memory that a step adds."""
    steps = LayerSteps("bf16", size_name(), events.DEVICE, pack(tokens))
    case = {"layer": "Qwen3-30B-A3B", "dtype": "bf16", "T": tokens, "lengths": pack(tokens)}
    row = {"family": "step", "kind": "train", "case": case}
    samples, facts = rows.measure(benchmark, steps, ["transformers", "liger"], budget=BUDGET, row=row)
    names = [f"{side} {part}" for part in PARTS for side in ("sail", "transformers") if side in samples]
    parts = harness.alternate(steps, names, BUDGET, events.Events().step)
    harness.record(
        benchmark,
        samples,
        parts_ms={name: 1e3 * seconds for name, seconds in parts.items()},
        peak_bytes={name: rows.peak_memory(steps, name) for name in samples},
        **facts,
    )
