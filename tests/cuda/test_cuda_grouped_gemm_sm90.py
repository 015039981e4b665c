"""The sm_90a grouped GEMM on an emulated Hopper (cuda_emulation/ptx_sm90.h): mbarriers, TMA, wgmma descriptors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import emulated
import internals
import pytest
import torch
from grouped_gemm import DTYPES, How, Problem, gated_backward, gated_forward, store_rows, wgrad
from test_cuda_device import SEVERAL_TILES

SOURCE = emulated.EMULATION / "grouped_gemm_sm90.cpp"

# Tiles are 128 x 256 with steps of 64 along K, four in shared memory.
PROBLEMS = {
    "one_tile": Problem((128,), 256, 64),
    "tails": Problem((70, 0, 133, 1), 264, 136),  # K and N end within a step and a tile, experts within a tile
    "ring": Problem((128, 30), 128, 392),  # seven steps: slots are used again
    "hot": Problem((0, 0, 300, 0), 64, 40),
    "gathered": Problem((5, 140, 0, 30), 72, 328, gather=True),
    "tail_rows": Problem((20, 3), 80, 32, tail=140),
    "long_tail": Problem((3,), 520, 16, tail=520),  # more tiles without products than slots
    "pitch": Problem((33, 9), 72, 48, pitch=8),
    "no_rows": Problem((0, 0), 64, 64, tail=5),
    "many_experts": Problem(tuple(i % 3 for i in range(70)), 40, 24),
}
# Of pairs: 3, 0, 2 and 1 row tiles, whose slots are used again while both blocks read one half of B from each other.
PAIRED = {
    name: PROBLEMS[name] for name in ("one_tile", "tails", "hot", "gathered", "tail_rows", "long_tail", "no_rows")
}
PAIRED |= {
    "shared": Problem((257, 0, 129, 1), 264, 328),
    "shared_gathered": Problem((300, 0, 20, 140), 72, 328, gather=True),
    "one_row": Problem((0, 1, 0), 520, 72),
    "many_experts": Problem(tuple(140 * (i > 31) + (i == 3) for i in range(35)), 40, 24),
}

Run = Callable[..., torch.Tensor]  # a function of tests/support/grouped_gemm.py
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
problems = pytest.mark.parametrize("name", PROBLEMS)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> emulated.Library:
    return emulated.compile(SOURCE, tmp_path_factory.mktemp("emulated"))


@dtypes
@problems
@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_store_rows(library: emulated.Library, dtype: torch.dtype, name: str, layout: str) -> None:
    store_rows(library, PROBLEMS[name], dtype, How(seed=1), layout)


@dtypes
@pytest.mark.parametrize("gather", [False, True], ids=["contiguous", "gathered"])
def test_odd_depth(library: emulated.Library, dtype: torch.dtype, gather: bool) -> None:
    """K need not be a multiple of anything where rows are padded to 16 bytes."""
    store_rows(library, Problem((9, 40), 64, 77, pitch=3, gather=gather), dtype, How(seed=2), "nk")


@dtypes
@pytest.mark.parametrize("name", ["tails", "gathered"])
@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_bias_weight_parts(library: emulated.Library, dtype: torch.dtype, name: str, layout: str) -> None:
    parts = layout == "kn" and name == "tails"
    store_rows(library, PROBLEMS[name], dtype, How(), layout, bias=True, weight=True, two_parts=parts)


@dtypes
@problems
def test_gated_forward(library: emulated.Library, dtype: torch.dtype, name: str) -> None:
    gated_forward(library, PROBLEMS[name], dtype, How(seed=3))


@dtypes
@problems
def test_gated_backward(library: emulated.Library, dtype: torch.dtype, name: str) -> None:
    gated_backward(library, PROBLEMS[name], dtype, How(seed=4), weight=name != "ring")


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations(library: emulated.Library, activation: str) -> None:
    p = PROBLEMS["tails"]
    gated_forward(library, p, torch.bfloat16, How(), activation=activation, clamp=0.5, bias=True, want="a")
    gated_backward(library, p, torch.bfloat16, How(), activation=activation, clamp=0.5)


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name not in ("no_rows", "long_tail")])
@pytest.mark.parametrize("fp32", [False, True], ids=["same", "fp32"])
@pytest.mark.parametrize("gather", [(False, True), (True, False), (False, False)], ids=["b", "a", "none"])
def test_wgrad(library: emulated.Library, name: str, fp32: bool, gather: tuple[bool, bool]) -> None:
    two_parts = accumulate = gather[1] == fp32
    dtype = DTYPES[gather[0] == fp32]
    how = How(seed=5)
    wgrad(library, PROBLEMS[name], dtype, how, fp32=fp32, accumulate=accumulate, two_parts=two_parts, gather=gather)


@pytest.mark.parametrize("run", [store_rows, gated_forward, gated_backward, wgrad])
@pytest.mark.parametrize("name", ["tails", "gathered"])
def test_repeatable(library: emulated.Library, run: Run, name: str) -> None:
    """Bitwise the same in any order of threads and blocks and on any number of blocks."""
    first = run(library, PROBLEMS[name], torch.bfloat16, How(seed=0, blocks=1))
    for seed in range(1, 5):
        assert torch.equal(run(library, PROBLEMS[name], torch.bfloat16, How(seed=seed, blocks=seed)), first)


# ---- clusters of two blocks
@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("run", [store_rows, gated_forward, gated_backward])
def test_pairs(library: emulated.Library, run: Run, name: str) -> None:
    """Accurate, and bitwise what single blocks give, in any order of threads and on any number of pairs."""
    dtype = DTYPES[len(name) % 2]
    layouts: list[dict[str, Any]] = [{"layout": layout} for layout in ("nk", "kn")] if run is store_rows else [{}]
    for options in layouts:
        single = run(library, PAIRED[name], dtype, How(seed=1), **options)
        for seed, blocks in ((0, 1), (1, 4)):
            paired = run(library, PAIRED[name], dtype, How(seed=seed, blocks=blocks, paired=True), **options)
            assert torch.equal(paired, single)


def test_pairs_of_two_parts(library: emulated.Library) -> None:
    """B in two parts along K, as dX has gate and up."""
    how = How(seed=1, paired=True)
    store_rows(library, PAIRED["shared"], torch.bfloat16, how, "kn", bias=True, weight=True, two_parts=True)


def test_pairs_are_chosen_from_two_row_tiles_an_expert() -> None:
    chosen = {(R, E): internals.choose_pairs(R, E) for R in (0, 255, 256, 32767, 32768) for E in (1, 128)}
    assert {at for at, wanted in chosen.items() if wanted} == {(256, 1), (32767, 1), (32768, 1), (32768, 128)}
    for case in SEVERAL_TILES:  # what a card runs in clusters
        assert internals.choose_pairs(case.T * case.K, case.E)


@pytest.mark.parametrize("run", [store_rows, gated_forward, gated_backward, wgrad])
def test_far_experts(library: emulated.Library, run: Run) -> None:
    """Weights of more elements than 32 bits count."""
    run(library, Problem((20, 9), 72, 40, expert_stride=2**31 + 8), torch.bfloat16, How())


@pytest.mark.parametrize(
    "p",
    [Problem((9, 40), 77, 64), Problem((9, 40), 64, 45), Problem((40,), 64, 64, shift=1)],
    ids=["columns", "depth", "address"],
)
def test_refuses_what_tma_cannot_read(library: emulated.Library, p: Problem) -> None:
    for run in (store_rows, gated_forward, gated_backward, wgrad):
        with pytest.raises(internals.EmulationError, match="not for TMA"):
            run(library, p, torch.bfloat16, How())


# ---- mutants
KERNEL, OPERAND = "grouped_gemm_sm90.cuh", "operand_sm90.cuh"


class Mutant(NamedTuple):
    """One change of a source file, and the check that must see it."""

    file: str
    old: str
    new: str
    run: Run
    problem: str
    layout: str | None = None  # store_rows
    paired: bool = False

    def fails(self, library: emulated.Library, seeds: int) -> bool:
        """Whether one of a few orders of threads shows it."""
        options = {"layout": self.layout} if self.layout else {}
        for seed in range(seeds):
            try:
                how = How(seed=seed, blocks=1, paired=self.paired)
                self.run(library, (PROBLEMS | PAIRED)[self.problem], torch.bfloat16, how, **options)
            except AssertionError:
                return True
        return False


EARLY_BOXES = "ptx::mbarrier_wait(&s.empty[slot], parity ^ 1);\n    if (i == 0)"
EARLY_ROWS = "ptx::mbarrier_wait(&s.empty[slot], parity ^ 1);\n    if (multiplies"
MUTANTS = {
    "copies_not_swizzled": Mutant(OPERAND, "(chunk ^ (row & 7)) << 4", "chunk << 4", store_rows, "gathered"),
    "no_proxy_fence": Mutant(KERNEL, "if (copied) ptx::fence_proxy_async();", "", store_rows, "gathered"),
    "no_wgmma_fence": Mutant(KERNEL, "ptx::wgmma_fence();", "", store_rows, "one_tile"),
    "full_phase": Mutant(KERNEL, "ring.parity);\n    if (copied)", "ring.parity ^ 1);\n    if (copied)", wgrad, "ring"),
    "empty_phase": Mutant(KERNEL, EARLY_BOXES, EARLY_BOXES.replace(" ^ 1", ""), store_rows, "ring"),
    "boxes_too_early": Mutant(KERNEL, EARLY_BOXES, "if (i == 0)", store_rows, "ring"),
    "rows_too_early": Mutant(KERNEL, EARLY_ROWS, "if (multiplies", store_rows, "gathered"),
    "offsets_swapped": Mutant(
        OPERAND,
        "(leading >> 4) << 16 | (stride >> 4) << 32",
        "(stride >> 4) << 16 | (leading >> 4) << 32",
        store_rows,
        "one_tile",
        "kn",
    ),
    "stride_along_k": Mutant(OPERAND, "stride = kPatternBytes", "stride = kRowBytes", store_rows, "one_tile", "nk"),
    "step_along_k": Mutant(OPERAND, "16 * kRowBytes : 32", "16 * kRowBytes : 64", store_rows, "one_tile", "nk"),
    "step_along_n": Mutant(OPERAND, "16 * kRowBytes : 32", "8 * kRowBytes : 32", store_rows, "one_tile", "kn"),
    "no_swizzle_mode": Mutant(OPERAND, "swizzle_128 = 1", "swizzle_128 = 0", store_rows, "one_tile"),
    "released_too_early": Mutant(KERNEL, "ptx::wgmma_wait<1>();", "", store_rows, "ring"),
    "stored_too_early": Mutant(KERNEL, "ptx::wgmma_wait<0>();", "", store_rows, "one_tile"),
    "one_warp_releases": Mutant(KERNEL, "s.empty[i], kConsumerWarps", "s.empty[i], 1", store_rows, "ring"),
    "bytes_promised": Mutant(KERNEL, "sizeof(s.a[0]) + sizeof(s.b[0]));", "sizeof(s.b[0]));", store_rows, "one_tile"),
    "one_half_of_rows": Mutant(KERNEL, "(threadIdx.x / 128 - 1) *", "0 *", store_rows, "one_tile"),
    "later_rounds": Mutant(KERNEL, "round < 8 ? rows[0] : rows[1]", "rows[0]", store_rows, "gathered"),
    "next_experts_rows": Mutant(KERNEL, "!from.index && r + kTileK <= row_end", "!from.index", wgrad, "tails"),
    "rows_past_the_end": Mutant(KERNEL, "(from.row(at)) : -1", "(from.row(at)) : 0", wgrad, "tails"),
    "gates_twice": Mutant(KERNEL, "kGated * box", "0", gated_forward, "one_tile"),
    "depth_of_rows": Mutant(
        OPERAND, "elements <= 0 ? 0 : elements < 8 ?", "elements < 8 && elements > 0 ?", store_rows, "gathered"
    ),
    "remote_without_cluster": Mutant(KERNEL, "if (!t.shares_b)", "if (false)", store_rows, "one_tile"),
}
SCHEDULER, REMOTE = "tile_scheduler.h", "ptx::mbarrier_arrive_at(&s.empty[slot], lane)"
START = "if (paired)\n    ptx::cluster_sync();\n  else\n    __syncthreads();"
PAIR_MUTANTS = {
    "own_slot_alone": (KERNEL, REMOTE, "ptx::mbarrier_arrive(&s.empty[slot])", "shared"),
    "one_block_releases": (KERNEL, "kConsumerWarps << paired", "kConsumerWarps", "shared"),
    "half_the_bytes": (KERNEL, "gathers ? sizeof(s.b[0])", "gathers ? sizeof(s.b[0]) / 2", "shared_gathered"),
    "first_half_twice": (KERNEL, "(blockIdx.x & 1))\n", "0)\n", "shared"),
    "to_itself_alone": (KERNEL, "tma_load_to(3,", "tma_load_to(1 << (blockIdx.x & 1),", "shared"),
    "outside_the_cluster": (KERNEL, "tma_load_to(3,", "tma_load_to(7,", "shared"),
    "no_barrier_at_the_start": (KERNEL, START, "__syncthreads();", "shared"),
    "no_barrier_at_the_end": (KERNEL, "if (args.paired) ptx::cluster_sync();", "", "shared"),
    "columns_share": (SCHEDULER, "* 2 + rank}, false}", "* 2 + rank}, true}", "one_row"),
    "both_the_same_rows": (SCHEDULER, "two.m * 2 + rank", "two.m * 2", "shared"),
    "odd_column_dropped": (SCHEDULER, "(n_tiles + 1) / 2", "n_tiles / 2", "one_row"),
}
MUTANTS |= {name: Mutant(*m[:3], store_rows, m[3], paired=True) for name, m in PAIR_MUTANTS.items()}


def test_few_kernels_pass(tmp_path: Path) -> None:
    """Unchanged, no check fails: a mutant fails for its change alone."""
    library = emulated.compile(SOURCE, tmp_path, "SAIL_FEW_KERNELS", mutate=lambda _: None)
    for mutant in {(m.run, m.problem, m.layout, m.paired): m for m in MUTANTS.values()}.values():
        assert not mutant.fails(library, seeds=2)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(tmp_path: Path, name: str) -> None:
    m = MUTANTS[name]

    def mutate(kernels: Path) -> None:
        emulated.replace_once(kernels / m.file, m.old, m.new)

    assert m.fails(emulated.compile(SOURCE, tmp_path, "SAIL_FEW_KERNELS", mutate=mutate), seeds=8)
