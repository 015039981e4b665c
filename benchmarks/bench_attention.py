"""`attention` and `attention_varlen`, forward and with the backward, beside torch's scaled_dot_product_attention.

Sequences of one length are a batch, others a pack. A batch's other peer is torch.compile of the eager formula, which
holds S^2 scores: up to 1,024 tokens. A pack's peers are SDPA by sequence, on the padded batch, and on nested tensors
(which it has not where causal).
GFLOP/s count 4 S^2 H A forward, half of it where causal, and 3.5 times as much with the backward: seven products.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import sail_ops
from benchmarks import harness
from benchmarks.cases import DTYPES, size_name
from benchmarks.limits import Limits
from sail_ops import reference

BUDGET = {"full": 1.5, "tiny": 0.02}  # seconds a row
MAX_EAGER = 1024  # tokens of a sequence whose scores are one tensor
RAGGED = (37, 1024, 256, 512, 96, 700, 3, 1400)


class Case(NamedTuple):
    """Lengths of the sequences, query and key/value heads, head dim; a decode step has `queries` at their ends."""

    lengths: tuple[int, ...]
    H: int = 16
    G: int = 4
    A: int = 128
    causal: bool = True
    queries: int | None = None
    mode: str = "train"
    dtype: str = "bf16"


CASES = {
    **{f"S{S}-{mode}": Case((S,), mode=mode) for S in (1024, 4096) for mode in ("forward", "train")},
    **{f"ragged-{mode}": Case(RAGGED, mode=mode) for mode in ("forward", "train")},
    **{f"ragged-vision-{mode}": Case(RAGGED, 16, 16, 72, causal=False, mode=mode) for mode in ("forward", "train")},
    "S1024-train-fp32": Case((1024,), dtype="fp32"),
    "vision-train": Case((1024,) * 2, 16, 16, 72, causal=False),  # patches of two images
    "decode1": Case((4096,), queries=1, mode="forward"),
    "decode8": Case((4096,), queries=8, mode="forward"),
}


def sized(case: Case) -> Case:
    """Tiny cases run every line; their timings mean nothing."""
    if size_name() == "full":
        return case
    lengths = tuple(min(n, 16 + n % 5) for n in case.lengths[:8])
    return case._replace(lengths=lengths, H=4, G=max(1, 4 * case.G // case.H))


class AttentionSteps:
    """One case's tensors; every implementation reads the same packed q, k, v and writes one packed output."""

    def __init__(self, case: Case, device: str = "cpu"):
        self.case, dtype = case, DTYPES[case.dtype]
        self.keys = list(case.lengths)
        self.queries = [case.queries or n for n in self.keys]
        shapes = (sum(self.queries), case.H), (sum(self.keys), case.G), (sum(self.keys), case.G)
        train = case.mode == "train"
        tensors = [torch.randn(*shape, case.A, device=device).to(dtype) for shape in (*shapes, shapes[0])]
        self.inputs, self.upstream = [t.requires_grad_(train) for t in tensors[:3]], tensors[3]
        self.cu_q, self.cu_k = (torch.tensor([0, *n]).cumsum(0).int().to(device) for n in (self.queries, self.keys))
        self.longest = max(self.queries), max(self.keys)
        self.real = None  # the padded batch's mask, where causality does not hide the padding
        if not case.causal:
            self.real = torch.arange(max(self.keys), device=device) < self.cu_k.diff()[:, None, None, None]
        # a bottom-right mask, which SDPA's own `is_causal` is not where there are more keys than queries
        self.is_causal = case.causal and case.queries is None
        self.mask = None
        if case.causal and case.queries is not None and case.queries > 1:
            S, L = case.queries, self.keys[0]
            self.mask = torch.ones(S, L, dtype=torch.bool, device=device).tril(L - S)

    @property
    def uniform(self) -> bool:
        """Whether the sequences are a batch."""
        return len(set(self.keys)) == 1

    def batch(self, *tensors: Tensor) -> list[Tensor]:
        """[B, S, H, A] of sequences of one length."""
        return [t.unflatten(0, (len(self.keys), -1)) for t in tensors]

    @property
    def flops(self) -> float:
        """Of the products that a mask leaves; the backward has 2.5 times as many as the forward."""
        c = self.case
        pairs = sum(q * k - (q * (q - 1) / 2 if c.causal else 0) for q, k in zip(self.queries, self.keys, strict=True))
        return 4 * pairs * c.H * c.A * (3.5 if c.mode == "train" else 1)

    def prepare(self, name: str) -> None:
        """Drop the gradients."""
        for tensor in self.inputs:
            tensor.grad = None

    def forward(self, name: str) -> Tensor:
        """out of the packed tensors."""
        return IMPLEMENTATIONS[name](self, *self.inputs)

    def run(self, name: str) -> None:
        """One step."""
        out = self.forward(name)
        if self.case.mode == "train":
            out.backward(self.upstream)

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Of tensors [B, S, H, A]."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        gqa = self.case.H != self.case.G
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.is_causal, enable_gqa=gqa)
        return out.transpose(1, 2)


def sail(s: AttentionSteps, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A batch goes through `attention`, a pack through `attention_varlen`."""
    if s.uniform:
        return sail_ops.attention(*s.batch(q, k, v), causal=s.case.causal).flatten(0, 1)
    return sail_ops.attention_varlen(q, k, v, s.cu_q, s.cu_k, *s.longest, causal=s.case.causal)


def batched(s: AttentionSteps, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One call."""
    return s.sdpa(*s.batch(q, k, v), s.mask).flatten(0, 1)


compiled_attention = torch.compile(reference.attention, dynamic=False)


def compiled(s: AttentionSteps, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula, fused by Inductor."""
    return compiled_attention(*s.batch(q, k, v), causal=s.case.causal).flatten(0, 1)


def by_sequence(s: AttentionSteps, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A call each."""
    parts = zip(q.split(s.queries), k.split(s.keys), v.split(s.keys), strict=True)
    return torch.cat([s.sdpa(*(t[None] for t in part), s.mask)[0] for part in parts])


def padded(s: AttentionSteps, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Right-padded to the longest."""
    q, k, v = (torch.nn.utils.rnn.pad_sequence(t.split(s.queries), batch_first=True) for t in (q, k, v))
    out = s.sdpa(q, k, v, s.real)
    return torch.cat([row[:n] for row, n in zip(out, s.queries, strict=True)])


def nested(s: AttentionSteps, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Jagged nested tensors."""
    jagged = [torch.nested.nested_tensor_from_jagged(t, s.cu_q.long()).transpose(1, 2) for t in (q, k, v)]
    return F.scaled_dot_product_attention(*jagged).transpose(1, 2).values()


IMPLEMENTATIONS: dict[str, Callable[[AttentionSteps, Tensor, Tensor, Tensor], Tensor]] = {
    "sail": sail,
    "sdpa": batched,
    "compiled": compiled,
    "sdpa_by_sequence": by_sequence,
    "sdpa_padded": padded,
    "sdpa_nested": nested,
}


def peers_of(case: Case) -> list[str]:
    """Padding and nested tensors where there is something to pad, scores where they are few."""
    if len(set(case.lengths)) == 1:
        return ["sdpa"] + ["compiled"] * (case.lengths[0] <= MAX_EAGER)
    return ["sdpa_by_sequence", "sdpa_padded"] + ["sdpa_nested"] * (not case.causal)


@pytest.mark.parametrize("name", CASES)
def test_attention(benchmark: BenchmarkFixture, name: str, limits: Limits) -> None:
    """Forward, or forward and backward, against all peers."""
    case = sized(CASES[name])
    steps, peers = AttentionSteps(case), peers_of(CASES[name])  # a tiny case has the full one's
    for peer in peers:
        steps.run(peer)  # compiles
    samples = harness.interleave(benchmark, steps, "sail", peers, budget=BUDGET[size_name()])
    gflops = steps.flops / benchmark.stats.stats.median / 1e9
    harness.record(
        benchmark,
        samples,
        family="attention",
        kind=case.mode,
        case={"name": name, **case._asdict()},
        gflops=gflops,
        of_dense_mm=gflops / limits.dense_gflops[case.dtype],
    )
