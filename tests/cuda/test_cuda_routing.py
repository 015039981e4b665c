"""The CUDA kernels around the grouped products, on the emulator: rows sorted by expert, gather-sums, expert sums."""

from pathlib import Path

import internals
import pytest
import torch
from emulated import EMULATION, Library, compile, replace_once
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sail_ops import testing

MUTANTS = {
    "a warp forgets the rows of those before it": ("row += here;", "row = row;"),
    "equal ids ranked from above": ("__popc(same & ((1u << lane) - 1))", "__popc(same >> lane) - 1"),
    "blocks before left out": ("int32_t row = start + earlier_blocks[e];", "int32_t row = start;"),
    "no barrier before the places are read": ("warps);\n  __syncthreads();", "warps);"),
    "ids past the last kept": ("id >= 0 && id < a.E ?", "id >= 0 && id <= a.E ?"),
}

SCALARS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return compile(EMULATION / "expert_rows.cpp", tmp_path_factory.mktemp("rows"))


def random_ids(T: int, K: int, E: int, seed: int = 0) -> Tensor:
    """A fifth of them outside [0, E), and a tenth on expert 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, E, (T, K), generator=generator)
    kind = torch.rand(T, K, generator=generator)
    outside = torch.tensor([-1, E, E + 7, -(2**31)])[torch.randint(4, (T, K), generator=generator)]
    return torch.where(kind < 0.1, 0, torch.where(kind < 0.3, outside, ids))


def check_sort(kernels: Library, ids: Tensor, E: int, weights: Tensor | None = None, seed: int = 0) -> None:
    (T, K), poison = ids.shape, -77
    if weights is None:
        weights = testing.random(T, K, seed=5)
    blocks, _, _ = internals.plan_sort(T * K, E)
    block_counts = torch.full((blocks + 1, E), poison, dtype=torch.int32)
    offsets, token, row_of = (torch.full((n + 1,), poison, dtype=torch.int32) for n in (E, T * K, T * K))
    weight = torch.full((T * K + 1,), torch.nan)
    problem = internals.RowSort(
        ids=ids,
        weights=weights,
        ids_stride=ids.stride(),
        weights_stride=weights.stride(),
        wide_ids=ids.dtype == torch.int64,
        weights_type=getattr(internals.Scalar, SCALARS[weights.dtype]),
        count=T * K,
        K=K,
        E=E,
        block_counts=block_counts,
        offsets=offsets,
        token=token,
        weight=weight,
        row_of=row_of,
    )
    kernels.sort_rows(seed, problem)

    flat = ids.flatten().long()
    inside = (flat >= 0) & (flat < E)
    order = torch.where(inside, flat, E).argsort(stable=True)[: int(inside.sum())]
    counts = torch.bincount(flat[inside], minlength=E)
    assert torch.equal(offsets.long(), torch.cat([torch.zeros(1).long(), counts.cumsum(0)]))
    assert torch.equal(token[: len(order)].long(), order // K) and (token[len(order) :] == poison).all()
    assert torch.equal(weight[: len(order)], weights.flatten()[order].float())
    want = torch.full((T * K,), -1)
    want[order] = torch.arange(len(order))
    assert torch.equal(row_of[:-1].long(), want) and row_of[-1] == poison


SHAPES = [(0, 2, 4), (1, 1, 1), (1, 8, 8), (199, 2, 8), (300, 7, 33), (700, 8, 128), (3000, 1, 3), (70, 4, 1024)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("T, K, E", [*SHAPES, (9, 3, 12032)])
def test_rows_are_sorted(kernels: Library, T: int, K: int, E: int, seed: int) -> None:
    check_sort(kernels, random_ids(T, K, E, seed), E, seed=seed)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(T=st.integers(0, 400), K=st.integers(1, 9), E=st.integers(1, 70), seed=st.integers(0, 99))
def test_any_shape(kernels: Library, T: int, K: int, E: int, seed: int) -> None:
    check_sort(kernels, random_ids(T, K, E, seed), E, seed=seed)


def test_layouts_and_dtypes(kernels: Library) -> None:
    ids = random_ids(130, 6, 16)
    for dtype in (torch.int32, torch.int64):
        for weights_dtype in testing.DTYPES:
            weights = testing.random(130, 6, dtype=weights_dtype)
            check_sort(kernels, ids.to(dtype), 16, weights)
            check_sort(kernels, ids.to(dtype).t().contiguous().t(), 16, weights.t().contiguous().t())
            check_sort(kernels, ids.to(dtype)[::2, 1::2], 16, weights[::2, 1::2])


def test_wide_ids_are_not_cut_to_32_bits(kernels: Library) -> None:
    check_sort(kernels, torch.tensor([[2**32 + 1, 1], [-(2**32), 0]]), 4)


def test_plan_covers_every_position_once() -> None:
    for count in [0, 1, 511, 512, 513, 65536, 262144, 262145, 10**6, 2**31 - 1]:
        for E in [1, 128, 1024, 1537, 4096, 12032]:
            blocks, warps, piece = internals.plan_sort(count, E)
            assert piece % (32 * warps) == 0 and warps * E * 4 <= 47 * 1024
            assert blocks == max(1, -(-count // piece)) <= 512


@pytest.mark.parametrize(("old", "new"), MUTANTS.values(), ids=MUTANTS.keys())
def test_a_wrong_sort_is_noticed(tmp_path: Path, old: str, new: str) -> None:
    def mutate(kernels: Path) -> None:
        replace_once(kernels / "routing_metadata.cuh", old, new)

    broken = compile(EMULATION / "expert_rows.cpp", tmp_path, mutate=mutate)

    def check() -> None:
        for seed in range(6):
            check_sort(broken, random_ids(300, 7, 33, seed), 33, seed=seed)

    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("E", [1, 5, 256, 300, 1100])
def test_ends_that_fall_or_pass_the_rows_are_moved(kernels: Library, E: int) -> None:
    rows = 50
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        ends = torch.randint(-20, 80, (E, 2), generator=generator, dtype=torch.int32)[:, 1]
        offsets = torch.full((E + 1,), -77, dtype=torch.int32)
        problem = internals.SortedRows(ends=ends, stride=ends.stride(0), E=E, rows=rows, offsets=offsets)
        kernels.clamp_ends(seed, problem)
        want = ends.long().cummax(0).values.clamp(0, rows)
        assert offsets[0] == 0 and torch.equal(offsets[1:].long(), want)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "T, D, K, threads", [(3, 64, 2, 32), (5, 77, 8, 32), (2, 520, 9, 64), (1, 24, 40, 32), (4, 8, 1, 32)]
)
def test_combine(kernels: Library, T: int, D: int, K: int, threads: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    row_of = torch.randperm(T * K, generator=generator).view(T, K)
    row_of[torch.rand(T, K, generator=generator) < 0.2] = -1
    rows, weight = testing.random(T * K, D, dtype=torch.bfloat16), testing.random(T * K, seed=1)
    rows[~torch.isin(torch.arange(T * K), row_of)] = torch.nan  # rows of nobody are not read
    out = torch.full((T, D), torch.nan, dtype=torch.bfloat16)
    given_rows = row_of.int().contiguous()
    problem = internals.Combine(rows=rows, row_of=given_rows, weight=weight if weighted else None, out=out, D=D, K=K)
    kernels.combine(D % 8 == 0, problem, T, threads)
    terms = (
        rows[row_of.clamp(min=0)].double() * (weight[row_of.clamp(min=0)] if weighted else torch.ones(T, K))[..., None]
    )
    ref = terms.where((row_of >= 0)[..., None], 0).sum(1)
    testing.assert_accurate(out, ref, ref.bfloat16())


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("columns", [8, 77, 264])
def test_expert_sums(kernels: Library, columns: int, gathered: bool) -> None:
    counts = [0, 1, 300, 0, 17]
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    R = int(offsets[-1])
    rows, weight = testing.random(R, columns, dtype=torch.bfloat16), testing.random(R, seed=1)
    index = torch.randint(R, (R,), generator=torch.Generator().manual_seed(2)).int()
    out = torch.full((5, columns), torch.nan, dtype=torch.bfloat16)
    fields = {"weight": weight, "offsets": offsets, "out": out, "columns": columns, "stride": columns}
    problem = internals.ExpertSum(**fields, **{"in": rows, "index": index if gathered else None})
    kernels.expert_sums(columns % 8 == 0, problem, 5)
    terms = (rows[index.long()] if gathered else rows).double() * weight.double()[:, None]
    ref = torch.stack([part.sum(0) for part in terms.split(counts)])
    testing.assert_accurate(out, ref, ref.bfloat16())
    assert not out[0].any() and not out[3].any()
