"""The cases of bench_moe.py: layer sizes, routings, and what a step must compute and move at the least.

T tokens, D hidden, F expert width, E experts, K top-k.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

GRAPH_TOKENS = 1024  # up to so many, graphs are replayed too
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Sizes:
    """Of one expert layer."""

    D: int
    F: int
    E: int
    K: int


SIZES = {
    "full": Sizes(D=2048, F=768, E=128, K=8),  # Qwen3-30B-A3B, the language model of SAIL-VL2-MoE
    "fine": Sizes(D=2048, F=512, E=512, K=10),  # Qwen3-Next-80B-A3B: many narrow experts
    "coarse": Sizes(D=4096, F=14336, E=8, K=2),  # Mixtral 8x7B: few wide ones
    "tiny": Sizes(D=64, F=32, E=16, K=4),  # runs every line of the benchmarks in seconds; its timings mean nothing
}


def size_name() -> str:
    """`SAIL_BENCH_SIZE`, "full" unless set."""
    name = os.environ.get("SAIL_BENCH_SIZE", "full")
    if name not in ("full", "tiny"):
        raise ValueError(f"SAIL_BENCH_SIZE: got {name!r}, want full or tiny")
    return name


@dataclass(frozen=True)
class MoeCase:
    """One row: `gradients` says where a training step puts dW.

    fresh       a new tensor each step, whose pages the kernel faults in
    huge_pages  the same in a process where malloc asks for 2 MiB pages, for every implementation
    in_place    added into a buffer that stays: `main_grads` for sail_ops, `.grad` accumulation for the others

    graph: the step is replayed as a CUDA graph, on a card.
    """

    dtype: str
    routing: str
    T: int
    mode: str
    gradients: str | None = None
    size: str = "full"
    device: str = "cpu"
    graph: bool = False

    @property
    def id(self) -> str:
        """As in `pytest -k`."""
        size = self.size if self.device == "cuda" else None
        parts = (self.dtype, self.routing, size, f"T{self.T}", self.mode, self.gradients, "graph" * self.graph)
        return "-".join(part for part in parts if part)

    @property
    def sizes(self) -> Sizes:
        return SIZES[self.size]

    @property
    def flops(self) -> int:
        """6 T K F D forward (three matrices, a multiply and an add each); the backward pass has twice as many."""
        s = self.sizes
        return (18 if self.mode == "train" else 6) * self.T * s.K * s.F * s.D

    def weight_traffic(self, hit: float) -> tuple[float, float]:
        """(bytes read, bytes written) of weights and dW at the least, with `hit` of the E experts routed to.

        Forward and backward each read the weights of the experts hit. A fresh dW is written for all E experts
        (zeros where none came), one in place is read and written for the experts hit.
        """
        s = self.sizes
        expert = 3 * s.F * s.D * DTYPES[self.dtype].itemsize
        if self.mode == "forward":
            return hit * expert, 0.0
        if self.gradients == "in_place":
            return 3 * hit * expert, hit * expert
        return 2 * hit * expert, s.E * expert


def moe_cases() -> list[MoeCase]:
    """Every row of bench_moe.py. Dtype is outermost: all rows of a dtype share one set of weights."""
    size = size_name()
    return [
        case
        for dtype in DTYPES
        for case in [
            *(
                MoeCase(dtype, routing, T, "forward", None, size)
                for routing in ("uniform", "zipf")
                for T in (1, 16, 128, 1024)
            ),
            *(
                MoeCase(dtype, routing, T, "train", gradients, size)
                for gradients in ("fresh", "huge_pages", "in_place")
                for routing in ("uniform", "zipf")
                for T in (128, 512)
            ),
        ]
    ]


def cuda_cases() -> list[MoeCase]:
    """Every row of bench_moe_cuda.py; all rows of a size share one set of weights. dW is a new tensor each step, whose
    memory torch's allocator keeps. Where launches may take longer than kernels, a step is replayed as a graph too."""
    shapes = {"full": (1024, 4096, 8192, 32768), "fine": (32768,), "coarse": (8192,)}
    if size_name() == "tiny":
        shapes = {"tiny": (64,)}
    return [
        MoeCase("bf16", routing, T, mode, "fresh" if mode == "train" else None, size, "cuda", graph)
        for size, tokens in shapes.items()
        for T in tokens
        for routing in ("uniform", "zipf")
        for mode in ("forward", "train")
        for graph in ((False, True) if T <= GRAPH_TOKENS and routing == "uniform" else (False,))
    ]


def draw_routings(case: MoeCase, pool: int) -> list[Tensor]:
    """`pool` routings, ids [T, K] each: K distinct experts a token, by Gumbel top-k over the experts' popularity.

    uniform: equal popularity; at T = 1 consecutive routings share no expert until all E were used, so that no cache
    holds their weights. zipf: popularity 1/rank, the ranks in random order (at E = 128, K = 8 the first
    expert draws five tokens in six).
    """
    s = case.sizes
    generator = torch.Generator().manual_seed(0)
    if case.routing == "uniform" and case.T == 1:
        chunks = torch.randperm(s.E, generator=generator)[: s.E // s.K * s.K].reshape(-1, 1, s.K)
        return [chunks[i % len(chunks)] for i in range(pool)]
    popularity_E = torch.ones(s.E)
    if case.routing == "zipf":
        popularity_E = 1 / (1 + torch.randperm(s.E, generator=generator).float())
    routings = []
    for _ in range(pool):
        gumbel_TE = -torch.empty(case.T, s.E).exponential_(generator=generator).log()
        routings.append((popularity_E.log() + gumbel_TE).topk(s.K, -1).indices)
    return routings
