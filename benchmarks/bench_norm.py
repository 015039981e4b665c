"""Norms, rotary embedding and `swiglu`, forward and backward, beside torch's functions and a copy's bandwidth.

transformers' own code is a peer where it does something else than torch's functions: not for LayerNorm and `swiglu`.
The copy goes into memory that is there, and so do the results of all implementations: malloc keeps what is freed.
"""

from collections.abc import Callable
from statistics import median
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

import sail_ops
from benchmarks import harness, liger
from benchmarks.cases import DTYPES, size_name
from benchmarks.memory import malloc_keeps
from sail_ops import reference

SHAPES = {"full": (4096, 2048), "tiny": (16, 64)}  # tokens of a micro-batch, hidden size
Shape = tuple[int, int]
HEADS = {"full": (32, 4, 128), "tiny": (2, 1, 16)}  # query and key heads, head dim: Qwen3-30B-A3B
# tensors like x (of qk_norm_rope: like q and k together) read or written, forward and backward
TRAFFIC = {"rms_norm": 5, "add_rms_norm": 8, "layer_norm": 5, "add_layer_norm": 8, "qk_norm_rope": 5, "swiglu": 8}
BUDGET = {"full": 3.0, "tiny": 0.02}  # seconds a row
Op = Callable[..., Tensor | tuple[Tensor, Tensor]]


def torch_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As a transformer layer without fusion has it."""
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, 1e-6), total


def torch_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The same with LayerNorm."""
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias, 1e-5), total


def torch_qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """torch's norm, then transformers' rotation."""
    q, k = F.rms_norm(q, q_weight.shape, q_weight, 1e-6), F.rms_norm(k, k_weight.shape, k_weight, 1e-6)
    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)


def qwen3_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """The forward of transformers' module, in eager mode."""
    return Qwen3RMSNorm.forward(SimpleNamespace(weight=weight, variance_epsilon=1e-6), x)  # type: ignore[arg-type]


def qwen3_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As its decoder layer has it."""
    total = x + residual
    return qwen3_rms_norm(total, weight), total


def qwen3_qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """As its attention has it: q_norm, k_norm, rotation."""
    q, k = qwen3_rms_norm(q, q_weight), qwen3_rms_norm(k, k_weight)
    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)


OPS: dict[str, dict[str, Op]] = {
    "rms_norm": {
        "sail": sail_ops.rms_norm,
        "torch": lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
        "transformers": qwen3_rms_norm,
    },
    "add_rms_norm": {
        "sail": sail_ops.add_rms_norm,
        "torch": torch_add_rms_norm,
        "transformers": qwen3_add_rms_norm,
    },
    "layer_norm": {"sail": sail_ops.layer_norm, "torch": lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-5)},
    "add_layer_norm": {"sail": sail_ops.add_layer_norm, "torch": torch_add_layer_norm},
    "qk_norm_rope": {
        "sail": sail_ops.qk_norm_rope,
        "torch": torch_qk_norm_rope,
        "transformers": qwen3_qk_norm_rope,
    },
    "swiglu": {"sail": sail_ops.swiglu, "torch": lambda gate, up: F.silu(gate) * up},
}
for name, implementations in OPS.items():
    implementations["compiled"] = torch.compile(getattr(reference, name), dynamic=False)  # the eager formula
    implementations["liger"] = liger.OPS[name]


def peers_of(op: str) -> list[str]:
    """A card has liger too."""
    return [name for name in ("torch", "transformers", "compiled") if name in OPS[op]]


class NormSteps:
    """Forward and backward of one operator, gradients returned and not accumulated: an addition's are one tensor."""

    def __init__(self, op: str, dtype: torch.dtype, shape: Shape, device: str = "cpu"):
        self.op = op
        self.tables: list[Tensor] = []
        if op == "qk_norm_rope":
            (T, _), (H, G, A) = shape, HEADS[size_name()]
            tensors = [torch.randn(T, H, A), torch.randn(T, G, A), torch.rand(A), torch.rand(A)]
            angles = torch.arange(T)[:, None] / 1e6 ** (torch.arange(A) % (A // 2) * 2 / A)
            self.tables = [angles.cos().to(dtype), angles.sin().to(dtype)]
            shapes = [tensors[0].shape, tensors[1].shape]
        else:
            vectors = {"swiglu": 0, "layer_norm": 2, "add_layer_norm": 2}.get(op, 1)
            pair = op == "swiglu" or op.startswith("add")
            tensors = [torch.randn(shape) for _ in range(1 + pair)] + [torch.rand(shape[-1]) for _ in range(vectors)]
            shapes = [shape] * (2 if op.startswith("add") else 1)
        elements = sum(t.numel() for t in tensors[:2]) if self.tables else tensors[0].numel()
        self.tables = [t.to(device) for t in self.tables]
        self.inputs = [t.to(device, dtype).requires_grad_() for t in tensors]
        self.upstream = [torch.randn(s, device=device).to(dtype) for s in shapes]
        self.traffic = TRAFFIC[op] * elements * dtype.itemsize
        self.source, self.target = (torch.ones(self.traffic // 8, device=device) for _ in range(2))

    def prepare(self, name: str) -> None:
        """Nothing is left of the step before."""

    def run(self, name: str) -> None:
        """One step, or a copy of as many bytes."""
        if name == "copy":
            self.target.copy_(self.source)
            return
        self.gradients(name)

    def gradients(self, name: str) -> tuple[Tensor, ...]:
        """Of every input."""
        out = OPS[self.op][name](*self.inputs, *self.tables)
        return torch.autograd.grad(out, self.inputs, self.upstream)


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_norm(benchmark: BenchmarkFixture, op: str, dtype: str) -> None:
    """A training step of one operator."""
    size = size_name()
    steps = NormSteps(op, DTYPES[dtype], SHAPES[size])
    peers = peers_of(op)
    for name in ("sail", *peers):
        steps.run(name)  # compiles
    with malloc_keeps():
        samples = harness.interleave(benchmark, steps, "sail", [*peers, "copy"], budget=BUDGET[size])
    tokens, hidden = SHAPES[size]
    harness.record(
        benchmark,
        samples,
        family="norm",
        kind="train",
        case={"op": op, "dtype": dtype, "T": tokens, "D": hidden},
        gb_s=steps.traffic / benchmark.stats.stats.median / 1e9,
        of_copy=median(samples["copy"]) / benchmark.stats.stats.median,
    )
