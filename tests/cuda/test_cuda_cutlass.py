"""What CUTLASS's grouped GEMM is told of each expert, on the emulator: shapes, pointers, strides, tail rows, and which
problems it is not given. Its kernel is test_cuda_build.py's and a card's (SAIL_OPS_CUDA_KERNELS=cutlass)."""

from pathlib import Path
from typing import NamedTuple

import emulated
import internals
import pytest
import torch
from grouped_gemm import DTYPES, How, Problem, store_rows

SOURCE = emulated.EMULATION / "cutlass_groups.cpp"
FILE = "cutlass_groups.cuh"

PROBLEMS = {
    "even": Problem((12, 8), 24, 16),
    "empty": Problem((7, 0, 13, 0, 1), 40, 32),
    "ends_empty": Problem((0, 5, 0), 24, 8),
    "hot": Problem((0, 0, 50, 0), 16, 16),
    "tail_rows": Problem((9, 3), 72, 16, tail=90),
    "no_rows": Problem((0, 0), 64, 64, tail=5),
    "pitch": Problem((11, 9), 24, 40, pitch=8),
    "many_experts": Problem(tuple(i % 3 for i in range(300)), 8, 16, tail=2),
    "far_experts": Problem((4, 0, 3), 16, 8, expert_stride=2**31 + 8),
}
NOT_FOR_CUTLASS = {
    "gathered": (Problem((12, 8), 16, 24, gather=True), {}),
    "along_n": (Problem((12, 8), 16, 24), {"layout": "kn"}),
    "bias": (Problem((12, 8), 16, 24), {"bias": True}),
    "weight": (Problem((12, 8), 16, 24), {"weight": True}),
    "two_parts": (Problem((12, 8), 16, 24), {"two_parts": True}),
    "address": (Problem((12, 8), 16, 24, shift=1), {}),
    "rows_apart": (Problem((12, 8), 16, 24, pitch=4), {}),
    "depth": (Problem((12, 8), 16, 20, pitch=4), {}),
    "columns": (Problem((12, 8), 20, 24), {}),
    "experts_apart": (Problem((12, 8), 16, 24, expert_stride=1001), {}),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> emulated.Library:
    return emulated.compile(SOURCE, tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_products(library: emulated.Library, dtype: torch.dtype, name: str) -> None:
    store_rows(library, PROBLEMS[name], dtype, How(seed=1))


@pytest.mark.parametrize("name", NOT_FOR_CUTLASS)
def test_others_are_not_given(library: emulated.Library, name: str) -> None:
    p, options = NOT_FOR_CUTLASS[name]
    with pytest.raises(internals.EmulationError, match="not for CUTLASS"):
        store_rows(library, p, torch.bfloat16, How(), **options)


class Mutant(NamedTuple):
    """One change of the source, and the problem that must show it."""

    old: str
    new: str
    problem: str


MUTANTS = {
    "last_row_missed": Mutant("p.offsets[e + 1] - begin", "p.offsets[e + 1] - begin - (e > 1)", "empty"),
    "first_row_of_a": Mutant("(p.a.data) + begin * p.a.stride", "(p.a.data) + begin * p.K", "pitch"),
    "near_experts": Mutant("e * p.b.expert_stride;", "e * p.b.expert_stride % (1ll << 31);", "far_experts"),
    "stride_of_b": Mutant("Stride{p.b.row_stride, ", "Stride{p.K, ", "pitch"),
    "one_block": Mutant("blockIdx.x) * blockDim.x + threadIdx.x;\n  if", "threadIdx.x);\n  if", "many_experts"),
    "first_of_tail": Mutant("i = *first * row_vectors", "i = (*first + 1) * row_vectors", "tail_rows"),
    "short_tail": Mutant("i += step)", "i += end)", "tail_rows"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(tmp_path: Path, name: str) -> None:
    m = MUTANTS[name]

    def mutate(kernels: Path) -> None:
        emulated.replace_once(kernels / FILE, m.old, m.new)

    changed = emulated.compile(SOURCE, tmp_path, mutate=mutate)
    with pytest.raises(AssertionError):
        store_rows(changed, PROBLEMS[m.problem], torch.bfloat16, How(seed=1))
