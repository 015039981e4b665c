"""The sm_90a attention forward on an emulated Hopper (cuda_emulation/ptx_sm90.h): turns, tails, packs, neighbors."""

import math
import re
from pathlib import Path

import emulated
import internals
import pytest
import torch
from cuda_attention import DTYPES, Case, Inputs, assert_accurate, forward, inputs

pytestmark = pytest.mark.cpu_only  # it emulates a card whatever runs the operators

SOURCE = emulated.EMULATION / "attention_sm90.cpp"

# Blocks are 128 rows, 192 where D is 64, against tiles of 128 keys.
CASES = {
    "one": Case(((1, 1),), B=1),
    "one_row": Case(((1, 1),), H=1, B=1, gap=4),  # dimensions of one have strides that TMA would not take
    "tiles": Case(((192, 256),), D=64, B=1),
    "full": Case(((70, 90),), H=2, G=2, D=96, causal=False, B=2),
    "tails": Case(((131, 197),), D=128, B=1),
    "many_tiles": Case(((40, 1100),), H=1, D=64, B=1),  # slots are used again
    "fewer_keys": Case(((150, 67),), D=72, B=1),  # the first queries see nothing
    "group": Case(((40, 175),), H=6, G=2, D=80, B=1),
    "gaps": Case(((33, 150),), H=2, G=2, D=64, B=2, gap=24),
    "negative_scale": Case(((40, 170),), D=64, B=1, scale=-0.2),
    "zero_scale": Case(((40, 70),), D=64, B=1, scale=0.0),
    "pack": Case(((37, 37), (0, 5), (1, 1), (5, 0), (0, 0), (230, 330), (3, 290), (60, 20)), D=64),
    "full_pack": Case(((37, 50), (0, 5), (1, 1), (5, 0), (90, 130)), H=4, G=2, D=128, causal=False),
    "odd_pack": Case(((140, 300), (9, 300), (20, 20)), H=2, G=1, D=72),
    "many_sequences": Case(tuple((i % 3, 20 + i % 4) for i in range(40)), H=1, D=80, causal=False),
}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> emulated.Library:
    return emulated.compile(SOURCE, tmp_path_factory.mktemp("emulated"))


@dtypes
@pytest.mark.parametrize("name", CASES)
def test_accuracy(library: emulated.Library, dtype: torch.dtype, name: str) -> None:
    x = inputs(CASES[name], dtype)
    assert_accurate(forward(library, CASES[name], x, seed=len(name)), CASES[name], x)


def test_repeatable(library: emulated.Library) -> None:
    """Bitwise the same in any order of threads, warps and blocks."""
    for name in ("pack", "full_pack"):
        x = inputs(CASES[name], torch.bfloat16)
        first = forward(library, CASES[name], x)
        for seed in range(1, 6):
            for a, b in zip(forward(library, CASES[name], x, seed)[:2], first[:2], strict=True):
                assert torch.equal(a, b)


def check_neighbors(library: emulated.Library, case: Case, x: Inputs, value: float) -> None:
    """What every other sequence (or batch) holds reaches nothing of the others, be it NaN or infinite."""
    assert case.gap == 0
    cu_q, cu_k = case.cu()
    q, k, v = (t.clone() for t in (x.q, x.k, x.v))
    mine = torch.ones(*x.q.shape[:-2], dtype=torch.bool)
    for i in range(1, case.B or len(case.lengths), 2):
        rows_q = i if cu_q is None else slice(int(cu_q[i]), int(cu_q[i + 1]))
        rows_k = i if cu_k is None else slice(int(cu_k[i]), int(cu_k[i + 1]))
        q[rows_q], k[rows_k], v[rows_k], mine[rows_q] = value, value, value, False
    clean, other = forward(library, case, x), forward(library, case, x._replace(q=q, k=k, v=v))
    assert torch.equal(other.out[mine], clean.out[mine]), "out"
    for h in range(case.H):
        assert torch.equal(other.lse.select(-2, h)[mine], clean.lse.select(-2, h)[mine]), "lse"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["full", "gaps", "pack", "full_pack", "odd_pack", "many_sequences"])
def test_neighbors(library: emulated.Library, name: str, value: float) -> None:
    case = CASES[name]._replace(gap=0)
    check_neighbors(library, case, inputs(case, torch.bfloat16), value)


@pytest.mark.parametrize(
    "cu_q",
    [(0, 90, 60, 400), (-5, 2**31 - 1, -(2**31), 3), (7, 7, 9, 10)],
    ids=["past_the_end", "wild", "gaps"],
)
def test_bad_cu_seqlens_stay_in_bounds(library: emulated.Library, cu_q: tuple[int, ...]) -> None:
    """Whatever the values: neither copies nor results outside of the tensors, and an end."""
    case = Case(((30, 30), (50, 50), (4, 4)), D=64)
    x = inputs(case, torch.bfloat16)
    good, bad = case.cu()[0], torch.tensor(cu_q, dtype=torch.int32)
    for cu in ((bad, good), (good, bad), (bad, bad)):
        forward(library, case, x, cu=cu)


def test_refuses_what_tma_cannot_read(library: emulated.Library) -> None:
    """No keys, or rows that do not start on 16 bytes: nothing is launched."""
    for case in (Case(((5, 0),), B=1), Case(((5, 9),), B=1, gap=4)):
        with pytest.raises(internals.EmulationError, match="not for TMA"):
            forward(library, case, inputs(case, torch.bfloat16))


FORWARD, OPERAND, SOFTMAX = "attention_forward_sm90.cuh", "operand_sm90.cuh", "attention_softmax.cuh"
MUTANTS = {
    "keys are not waited for": (FORWARD, "s.wait_full(2 * i);", ""),
    "values are not waited for": (FORWARD, "s.wait_full(2 * i + 1);", ""),
    "queries are not waited for": (FORWARD, "ptx::mbarrier_wait(&s.queries_full, 0);", ""),
    "copies are not waited for": (FORWARD, "ptx::mbarrier_wait(&s.copied, 0);", ""),
    "copies are not fenced": (FORWARD, "ptx::fence_proxy_async();", ""),
    "a slot is loaded too early": (FORWARD, "s.wait_empty(tile);\n  ptx::mbarrier_arrive", "ptx::mbarrier_arrive"),
    "a slot is copied to too early": (FORWARD, "s.wait_empty(tile);\n  for", "for"),
    "keys are released too early": (FORWARD, "ptx::wgmma_wait<1>();", ""),
    "sums are read too early": (FORWARD, "ptx::wgmma_wait<0>();\n      ptx::hold(flat(o));", ""),
    "one warp releases": (FORWARD, "4 * Shape::kGroups", "1"),
    "no fence before the last product": (FORWARD, "ptx::hold(p[0][k]);\n  ptx::wgmma_fence();", ";"),
    "scores are added": (FORWARD, "Shape::kN, false, false, false>", "Shape::kN, true, false, false>"),
    "both groups take the same queries": (FORWARD, "group * Operand<false>::kRows64Bytes", "0"),
    "values of the wrong half": (FORWARD, "k / 4 * Shape::kPanels * kPanelBytes", "k / 4 * kPanelBytes"),
    "probabilities change under the product": (
        FORWARD,
        "probabilities(i);\n",
        "probabilities(i);\n      round_rows<T>(rounded, p);\n",
    ),
    "old sums keep their scale": (FORWARD, "softmax.rescale(o);", ""),
    "group 0 waits for its first turn": (FORWARD, "if (group || !first)", ""),
    "queries see a key too many": (FORWARD, "w.first + m + w.behind)", "w.first + m + w.behind + 1)"),
    "the last key is not seen": (FORWARD, "min(w.end - 1,", "min(w.end - 2,"),
    "a head of another group": (
        FORWARD,
        "block.head / static_cast<int>(a.H / a.G)",
        "block.head % static_cast<int>(a.G)",
    ),
    "the next sequence's values": (FORWARD, "tiles * Shape::kN > s.nk &&", "false &&"),
    "rows past the end are copied": (FORWARD, "row < w.s.nk && at", "at"),
    "a risen maximum is overlooked": (SOFTMAX, "changed || m != old", "changed"),
    "values along the wrong way": (OPERAND, "leading = kAlongMN ? kPanelBytes", "leading = kAlongMN ? kPatternBytes"),
}


def check_all(library: emulated.Library) -> None:
    """Some orders of threads, as a missing wait need not show in one."""
    for seed in range(2):
        for name in ("tails", "group", "many_tiles", "odd_pack"):
            x = inputs(CASES[name], torch.bfloat16)
            assert_accurate(forward(library, CASES[name], x, seed), CASES[name], x)
        check_neighbors(library, CASES["odd_pack"], inputs(CASES["odd_pack"], torch.bfloat16), math.nan)


def compile_mutant(folder: Path, file: str, old: str, new: str) -> emulated.Library:
    def mutate(kernels: Path) -> None:
        emulated.replace_once(kernels / file, old, new)
        dispatch = kernels / "attention_dispatch_sm90.cuh"  # every head dim in the widest kernel, for speed
        dispatch.write_text(re.sub(r"  if \(a.D <= \d+\) return .*\n", "", dispatch.read_text()))

    return emulated.compile(SOURCE, folder, "SAIL_ONLY_BF16", mutate=mutate)


def test_widest_kernel_passes(tmp_path: Path) -> None:
    """Unchanged, no check fails: a mutant fails for its change alone."""
    check_all(compile_mutant(tmp_path, FORWARD, "#pragma once", "#pragma once"))


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(tmp_path: Path, name: str) -> None:
    broken = compile_mutant(tmp_path, *MUTANTS[name])
    with pytest.raises(AssertionError):
        check_all(broken)
