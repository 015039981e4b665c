"""`attention` and `attention_varlen` on an NVIDIA card, beside torch's backends and flash-attn; 16k tokens a case.

sdpa is torch's own choice; sdpa_flash, sdpa_cudnn and sdpa_efficient name a backend, the last with k and v repeated
for every query head, as it has no grouped ones. torch_varlen is torch.nn.attention's, for packs; flash_attn is the
package of that name.
"""

from collections.abc import Callable
from functools import partial
from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import bench_attention, events, graphs, harness, rows
from benchmarks.bench_attention import RAGGED, AttentionSteps, Case, batched
from benchmarks.limits import Limits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
BUDGET = 0.4  # seconds of rounds a row
BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
DECODE = Case((4096,) * 16, 32, 4, 128, mode="forward")
CASES = {
    f"{name}-{mode}": case._replace(mode=mode)
    for name, case in {
        **{f"S{S}": Case((S,) * (16384 // S), 32, 4, 128) for S in (1024, 4096, 16384)},
        "ragged": Case(RAGGED * 4, 32, 4, 128),
        "vision": Case((1024,) * 16, 16, 16, 72, causal=False),  # patches of 16 images
        "ragged-vision": Case(RAGGED * 4, 16, 16, 72, causal=False),
    }.items()
    for mode in ("forward", "train")
} | {f"decode{n}": DECODE._replace(queries=n) for n in (1, 8)}
# a step of decoding is replayed as a CUDA graph too
ROWS = [(name, graph) for name, case in CASES.items() for graph in ((False, True) if case.queries else (False,))]


def by_backend(backend: SDPBackend, s: AttentionSteps, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA of a batch by one backend; RuntimeError where it does not take the case."""
    if backend == SDPBackend.EFFICIENT_ATTENTION:
        k, v = (t.repeat_interleave(s.case.H // s.case.G, 1) for t in (k, v))
    with sdpa_kernel(backend):
        return batched(s, q, k, v)


def torch_varlen(s: AttentionSteps, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's packed attention; a window of no key to the right is causal."""
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, 0 if s.case.causal else -1)
    return varlen_attn(q, k, v, s.cu_q, s.cu_k, *s.longest, window_size=window, enable_gqa=s.case.H != s.case.G)


def flash_attn(s: AttentionSteps, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The package's two functions; its causal mask is aligned as ours."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if s.uniform:
        return flash_attn_func(*s.batch(q, k, v), causal=s.case.causal).flatten(0, 1)
    return flash_attn_varlen_func(q, k, v, s.cu_q, s.cu_k, *s.longest, causal=s.case.causal)


IMPLEMENTATIONS: dict[str, Callable[[AttentionSteps, Tensor, Tensor, Tensor], Tensor]] = {
    **{name: partial(by_backend, backend) for name, backend in BACKENDS.items()},
    "torch_varlen": torch_varlen,
    "flash_attn": flash_attn,
}


class CardSteps(AttentionSteps):
    """With a card's peers too."""

    def forward(self, name: str) -> Tensor:
        """out of the packed tensors."""
        return IMPLEMENTATIONS[name](self, *self.inputs) if name in IMPLEMENTATIONS else super().forward(name)


def peers_of(case: Case) -> list[str]:
    """Backends for a batch, beside what a CPU has too."""
    ragged = len(set(case.lengths)) > 1
    return [*bench_attention.peers_of(case), *(["torch_varlen"] if ragged else BACKENDS), "flash_attn"]


@pytest.mark.parametrize("name, graph", ROWS, ids=[f"{name}{'-graph' * graph}" for name, graph in ROWS])
def test_attention(benchmark: BenchmarkFixture, name: str, graph: bool, cuda_limits: Limits) -> None:
    """Forward, or forward and backward, against all peers."""
    case = bench_attention.sized(CASES[name])
    steps = CardSteps(case, events.DEVICE)
    timed = graphs.Replays(steps) if graph else steps
    row = {"family": "attention", "kind": case.mode, "case": {"name": name, **case._asdict(), "graph": graph}}
    samples, facts = rows.measure(benchmark, timed, peers_of(CASES[name]), budget=BUDGET, row=row)
    gflops = steps.flops / median(samples["sail"]) / 1e9
    harness.record(
        benchmark,
        samples,
        gflops=gflops,
        of_dense_mm=gflops / cuda_limits.dense_gflops[case.dtype],
        **facts,
    )
