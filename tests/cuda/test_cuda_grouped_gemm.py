"""The sm_80 grouped GEMM on an emulated GPU (tests/cuda_emulation): every problem, layout, tile shape and epilogue."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import emulated
import internals
import pytest
import torch
from grouped_gemm import DTYPES, PROBLEMS, How, Problem, gated_backward, gated_forward, store_rows, wgrad
from torch import Tensor

pytestmark = pytest.mark.cpu_only  # it emulates a card whatever runs the operators

SOURCE = emulated.EMULATION / "grouped_gemm_sm80.cpp"
Run = Callable[..., Tensor]
RUNS: list[Run] = [store_rows, gated_forward, gated_backward, wgrad]
SHAPES = ("small", "medium", "large")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
problems = pytest.mark.parametrize("name", PROBLEMS)
shapes = pytest.mark.parametrize("tiles", SHAPES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch's waiting threads would take the emulation's CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> emulated.Library:
    return emulated.compile(SOURCE, tmp_path_factory.mktemp("emulated"))


@dtypes
@problems
@shapes
@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_store_rows(library: emulated.Library, dtype: torch.dtype, name: str, tiles: str, layout: str) -> None:
    store_rows(library, PROBLEMS[name], dtype, How(tiles, seed=SHAPES.index(tiles)), layout)


@dtypes
@pytest.mark.parametrize("name", ["tails", "odd"])
@pytest.mark.parametrize("layout", ["nk", "kn"])
@pytest.mark.parametrize("two_parts", [False, True], ids=["one_part", "two_parts"])
def test_bias_weight_parts(
    library: emulated.Library, dtype: torch.dtype, name: str, layout: str, two_parts: bool
) -> None:
    store_rows(library, PROBLEMS[name], dtype, How(), layout, bias=True, weight=True, two_parts=two_parts)


@dtypes
@problems
@shapes
def test_gated_forward(library: emulated.Library, dtype: torch.dtype, name: str, tiles: str) -> None:
    gated_forward(library, PROBLEMS[name], dtype, How(tiles, seed=SHAPES.index(tiles)))


@dtypes
@pytest.mark.parametrize("name", ["tails", "odd"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("clamp", [None, 0.5])
def test_activations(
    library: emulated.Library, dtype: torch.dtype, name: str, activation: str, clamp: float | None
) -> None:
    p = PROBLEMS[name]
    gated_forward(library, p, dtype, How(), activation=activation, clamp=clamp, bias=True)
    gated_backward(library, p, dtype, How(), activation=activation, clamp=clamp)


@pytest.mark.parametrize("want", ["h", "a"])
def test_only_one_result(library: emulated.Library, want: str) -> None:
    gated_forward(library, PROBLEMS["tails"], torch.bfloat16, How(), want=want)


@dtypes
@problems
@shapes
def test_gated_backward(library: emulated.Library, dtype: torch.dtype, name: str, tiles: str) -> None:
    gated_backward(library, PROBLEMS[name], dtype, How(tiles, seed=SHAPES.index(tiles)), weight=name != "even")


@dtypes
@problems
@pytest.mark.parametrize("fp32", [False, True], ids=["same", "fp32"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["set", "add"])
def test_wgrad(library: emulated.Library, dtype: torch.dtype, name: str, fp32: bool, accumulate: bool) -> None:
    p = PROBLEMS[name]
    for two_parts, gather in ((True, (False, True)), (False, (True, False))):
        wgrad(library, p, dtype, How(), fp32=fp32, accumulate=accumulate, two_parts=two_parts, gather=gather)


@pytest.mark.parametrize("run", RUNS)
def test_far_experts(library: emulated.Library, run: Run) -> None:
    """Weights of more elements than 32 bits count."""
    run(library, Problem((20, 9), 72, 40, expert_stride=2**31 + 8), torch.bfloat16, How())


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", ["tails", "odd"])
def test_repeatable(library: emulated.Library, run: Run, name: str) -> None:
    """Bitwise the same in any order of threads and blocks and on any number of blocks."""
    first = run(library, PROBLEMS[name], torch.bfloat16, How(seed=0, blocks=1))
    for seed in range(1, 8):
        assert torch.equal(run(library, PROBLEMS[name], torch.bfloat16, How(seed=seed, blocks=seed)), first)


# ---- tile scheduler, tile shapes, shared memory
COUNTS = [*itertools.product((0, 1, 2, 3, 5), repeat=3), (0,) * 40, (1,) * 33, (0,) * 32 + (7,), (60, 0, 90), ()]


@pytest.mark.parametrize(("tile_rows", "n_tiles"), [(1, 1), (2, 3), (2, 1), (4, 2)])
@pytest.mark.parametrize("tail", [None, 0, 3], ids=["no_tail", "empty_tail", "tail"])
def test_row_tiles(library: emulated.Library, tile_rows: int, n_tiles: int, tail: int | None) -> None:
    """Every (expert, rows, columns) once, on any number of blocks, and within the bound that sizes the grid."""
    for counts, blocks in itertools.product(COUNTS, (1, 3)):
        tiles = Tiles(counts, tail, tile_rows, n_tiles)
        entries = tiles.handed_out(library, blocks)
        expected = tiles.expected()
        assert sorted(i for i, *_ in entries) == list(range(len(expected))), counts
        assert {tuple(entry) for _, *entry, _ in entries} == expected, counts
        assert not any(shares for *_, shares in entries)


@pytest.mark.parametrize(("tile_rows", "n_tiles"), [(1, 1), (2, 3), (2, 1), (1, 2)])
@pytest.mark.parametrize("tail", [None, 3], ids=["no_tail", "tail"])
def test_row_tiles_of_pairs(library: emulated.Library, tile_rows: int, n_tiles: int, tail: int | None) -> None:
    """Every tile once, in any number of pairs; both blocks of a pair get neighboring rows of one column, or columns of
    an expert's last row; one of them nothing only past an odd last column."""
    for counts, pairs in itertools.product(COUNTS, (1, 3)):
        tiles = Tiles(counts, tail, tile_rows, n_tiles)
        entries = tiles.handed_out(library, 2 * pairs, paired=True)
        work = [tuple(entry) for _, *entry, _ in entries]
        real = [entry for entry in work if entry[3] < n_tiles]
        assert len(set(real)) == len(real) and set(real) == tiles.expected(), counts
        by_number: dict[int, list[list[int]]] = {}
        for i, *entry in entries:
            by_number.setdefault(i, []).append(entry)
        assert sorted(by_number) == list(range(len(by_number))), counts
        for (e, row, end, n, shares), other in map(sorted, by_number.values()):
            assert other == ([e, row + tile_rows, end, n, 1] if shares else [e, row, end, n + 1, 0]), counts
            assert n < n_tiles and row < end and (not shares or row + tile_rows < end), counts
        columns_left_over = len(real) < len(work)
        odd = any(-(-count // tile_rows) % 2 for count in tiles.counts)
        assert columns_left_over == (odd and n_tiles % 2 == 1), counts


class Tiles(NamedTuple):
    """Rows of each expert, and of the tail if there is one, in tiles."""

    experts: tuple[int, ...]
    tail: int | None
    tile_rows: int
    n_tiles: int

    @property
    def counts(self) -> list[int]:
        return [*self.experts, *([self.tail] if self.tail is not None else [])]

    def expected(self) -> set[tuple[int, ...]]:
        """(expert, first row, end of the expert's rows, column) of every tile."""
        starts = [0, *itertools.accumulate(self.counts)]
        return {
            (e, row, starts[e + 1], n)
            for e, count in enumerate(self.counts)
            for row in range(starts[e], starts[e] + count, self.tile_rows)
            for n in range(self.n_tiles)
        }

    def handed_out(self, library: emulated.Library, blocks: int, paired: bool = False) -> list[list[int]]:
        """(number, expert, first row, end, column, whether B is shared) as blocks take them, within the bound that
        sizes the grid; a pair's odd last columns are a tile more for each expert."""
        offsets = torch.tensor([0, *itertools.accumulate(self.experts)], dtype=torch.int32)
        R, E = sum(self.counts), len(self.experts)
        most = internals.most_row_tiles(R, E, self.tile_rows, self.n_tiles) + paired * (E + 1)
        found, count = torch.zeros(most + 1, 6, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        problem = internals.RowsProblem(offsets=offsets, R=R, E=E, zero_tail=self.tail is not None)
        how = internals.How(blocks=blocks, paired=paired)
        library.row_tiles(problem, how, self.tile_rows, self.n_tiles, most + 1, found, count)
        assert int(count) <= most
        return found[: int(count)].tolist()


def test_wgrad_tiles() -> None:
    """Every (expert, m, n) once, experts in order; columns change fastest after groups of 16 rows of tiles."""
    for experts, m_tiles, n_tiles in itertools.product((1, 3), (1, 2, 15, 16, 17, 40), (1, 2, 5)):
        count = experts * m_tiles * n_tiles
        tiles = [tuple(internals.wgrad_tile(i, m_tiles, n_tiles)) for i in range(count)]
        assert sorted(tiles) == list(itertools.product(range(experts), range(m_tiles), range(n_tiles)))
        assert [e for e, _, _ in tiles] == sorted(e for e, _, _ in tiles)
        assert all(tile[1] // 16 <= after[1] // 16 for tile, after in itertools.pairwise(tiles) if tile[0] == after[0])


def test_tile_choice() -> None:
    """Larger tiles for more rows an expert; the shapes of the benchmarks."""
    chosen = [internals.choose_tiles(rows * 8, 8).name for rows in range(1, 5000)]
    assert chosen == sorted(chosen, key=SHAPES.index) and set(chosen) == set(SHAPES)
    for R, E, shape in ((8, 128, "small"), (8192, 128, "medium"), (65536, 128, "large"), (262144, 128, "large")):
        assert internals.choose_tiles(R, E).name == shape


def test_no_bank_conflicts(library: emulated.Library) -> None:
    assert library.bank_conflicts() == 1


# ---- mutants
KERNEL, OPERANDS, EPILOGUES = "grouped_gemm_sm80.cuh", "operands_sm80.cuh", "epilogues.cuh"
LEFT = "left > 0 ? left : 0"


class Mutant(NamedTuple):
    """One change of a source file, and the check that must see it."""

    file: str
    old: str
    new: str
    run: Run
    problem: str
    two_parts: bool = False

    def fails(self, library: emulated.Library, seeds: int) -> bool:
        """Whether one of a few orders of threads shows it."""
        options = {"two_parts": True} if self.two_parts else {}
        for seed in range(seeds):
            try:
                self.run(library, PROBLEMS[self.problem], torch.bfloat16, How(seed=seed, blocks=1), **options)
            except AssertionError:
                return True
        return False


MUTANTS = {
    "fragments_swapped": Mutant(OPERANDS, "kTransposed != kFirst", "kTransposed == kFirst", store_rows, "tails"),
    "wait_for_too_few": Mutant(KERNEL, "wait<Shape::kStages - 2>", "wait<Shape::kStages - 1>", store_rows, "deep"),
    "no_barrier_in_step": Mutant(KERNEL, "2>();\n      __syncthreads();", "2>();", store_rows, "deep"),
    "no_barrier_between_tiles": Mutant(
        KERNEL, "    __syncthreads();  // the last", "    // the last", store_rows, "tails"
    ),
    "copy_too_early": Mutant(
        KERNEL, "load(step + Shape::kStages - 1)", "load(step + Shape::kStages)", store_rows, "deep"
    ),
    "block_swizzle": Mutant(OPERANDS, "at_ ^ static_cast<uint32_t>(block", "at_ + (block", wgrad, "tails"),
    "step_swizzle": Mutant(OPERANDS, "at_ ^ static_cast<uint32_t>(step", "at_ + (step", store_rows, "deep"),
    "tail_of_k_dropped": Mutant(OPERANDS, LEFT, "0", store_rows, "narrow"),
    "past_the_row": Mutant(OPERANDS, LEFT, "left > 0 ? 8 : 0", store_rows, "narrow"),
    "next_experts_rows": Mutant(OPERANDS, "k < rows_ - i * Mine::kStep ? elements_ : 0", "elements_", wgrad, "tails"),
    "index_not_ahead": Mutant(OPERANDS, "look_ahead(k + Tile::kRows);", "look_ahead(k);", wgrad, "tails"),
    "empty_expert_skipped": Mutant(KERNEL, "if (!rows && arguments.accumulate)", "if (!rows)", wgrad, "tails"),
    "quad_not_turned": Mutant(EPILOGUES, "d < 4; d *= 2", "d < 2; d *= 2", store_rows, "even"),
    "gate_for_up": Mutant(KERNEL, "% 2 ? second : first", "% 2 ? first : second", gated_forward, "even"),
    "dot_of_two_lanes": Mutant(EPILOGUES, "dot += __shfl_xor_sync(~0u, dot, 2);", "", gated_backward, "even"),
    "split_ignored": Mutant("grouped_gemm.h", "(i < split ? i : i - split)", "i", wgrad, "even", two_parts=True),
}


def test_few_kernels_pass(tmp_path: Path) -> None:
    """Unchanged, no check fails: a mutant fails for its change alone."""
    library = emulated.compile(SOURCE, tmp_path, "SAIL_FEW_KERNELS", mutate=lambda _: None)
    for mutant in {(m.run, m.problem, m.two_parts): m for m in MUTANTS.values()}.values():
        assert not mutant.fails(library, seeds=2)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(tmp_path: Path, name: str) -> None:
    m = MUTANTS[name]

    def mutate(kernels: Path) -> None:
        emulated.replace_once(kernels / m.file, m.old, m.new)

    assert m.fails(emulated.compile(SOURCE, tmp_path, "SAIL_FEW_KERNELS", mutate=mutate), seeds=8)
