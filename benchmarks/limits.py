"""What the machine can do, measured in the same run: dense matrix products and memory bandwidth."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.cases import DTYPES, MoeCase
from benchmarks.events import Events
from benchmarks.harness import best_of


@dataclass(frozen=True)
class Limits:
    """Rates of torch's own kernels, the best of several shapes and repeats."""

    dense_gflops: dict[str, float]
    read_gb_s: float
    write_gb_s: float
    copy_gb_s: float  # read and written bytes together

    def seconds(self, dtype: str, flops: float, read: float, written: float) -> float:
        """The least time: arithmetic and traffic overlap perfectly, each at its rate."""
        traffic = read / self.read_gb_s + written / self.write_gb_s
        return max(flops / self.dense_gflops[dtype], traffic) / 1e9

    def rates(self, case: MoeCase, experts_hit: float, seconds: float) -> dict[str, Any]:
        """What a step of an expert layer in `seconds` means: its case, its rates, their fractions of these."""
        read, written = case.weight_traffic(experts_hit)
        gflops, traffic = case.flops / seconds / 1e9, (read + written) / seconds / 1e9
        return {
            "family": "moe",
            "kind": case.mode,
            "case": vars(case) | vars(case.sizes) | {"experts_hit": experts_hit},
            "gflops": gflops,
            "weights_gb_s": traffic,
            "of_dense_mm": gflops / self.dense_gflops[case.dtype],
            "of_read_bandwidth": traffic / self.read_gb_s,
            "of_limit": self.seconds(case.dtype, case.flops, read, written) / seconds,
        }

    def as_dict(self) -> dict[str, object]:
        """For the JSON file."""
        return asdict(self)


def measure(size: str) -> Limits:
    """About four seconds at "full"; buffers far larger than any cache."""
    tiny = size == "tiny"
    numbers, repeats = (2**20, 2) if tiny else (2**28, 5)
    source, target = torch.ones(numbers), torch.zeros(numbers)
    gb = source.nbytes / 1e9
    read = min(
        best_of(source.sum, repeats),
        best_of(source.max, repeats),
        best_of(lambda: torch.dot(source, target), repeats) / 2,
    )
    write = min(best_of(lambda: target.fill_(1.0), repeats), best_of(target.zero_, repeats))
    copy = best_of(lambda: target.copy_(source), repeats)
    shapes = [(64, 64, 64)] if tiny else [(2048, 2048, 2048), (4096, 2048, 1536), (4096, 4096, 4096)]
    dense = {name: max(dense_gflops(dtype, *shape, repeats) for shape in shapes) for name, dtype in DTYPES.items()}
    return Limits(dense, gb / read, gb / write, 2 * gb / copy)


def measure_cuda() -> Limits:
    """The same on a card: by CUDA events, the second-level cache overwritten before each repeat."""
    events = Events()
    source, target = (torch.ones(2**28, device="cuda") for _ in range(2))
    gb = source.nbytes / 1e9
    read, write = events.best_of(source.sum), events.best_of(target.zero_)
    copy = events.best_of(lambda: target.copy_(source))
    dense = 0.0
    for m, k, n in [(8192, 8192, 8192), (16384, 4096, 8192), (32768, 2048, 6144)]:
        a, b = (torch.randn(rows, k, device="cuda").bfloat16() for rows in (m, n))
        dense = max(dense, 2 * m * k * n / events.best_of(partial(torch.mm, a, b.t())) / 1e9)
    return Limits({"bf16": dense}, gb / read, gb / write, 2 * gb / copy)


def dense_gflops(dtype: torch.dtype, m: int, k: int, n: int, repeats: int) -> float:
    """Of `torch.mm`, [m, k] x [n, k]^T as a linear layer has it, into an existing output."""
    a, b, out = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.empty(m, n, dtype=dtype)
    torch.mm(a, b.t(), out=out)
    return 2 * m * k * n / best_of(lambda: torch.mm(a, b.t(), out=out), repeats) / 1e9
