"""The attention kernels of csrc/cuda/kernels on an emulated GPU: masks, tails, packs, splits."""

import re
from collections.abc import Iterator
from pathlib import Path

import emulated
import emulated_library
import internals
import pytest
import torch
from cuda_attention import DTYPES, Case, Inputs, Outputs, assert_accurate, backward, decode, forward, inputs

import sail_ops
from sail_ops import reference, testing

pytestmark = pytest.mark.cpu_only  # it emulates a card whatever runs the operators

SOURCE = emulated.EMULATION / "attention_sm80.cpp"

# Blocks are 128 rows against tiles of 64 or 32.
CASES = {
    "one": Case(((1, 1),), B=1, dlse=True),  # with dout alone dq and dk are 0 but for rounding
    "tiles": Case(((128, 128),), D=64, B=1),
    "full": Case(((70, 90),), H=2, G=2, D=96, causal=False, B=2),
    "tails": Case(((131, 197),), D=128, B=1),
    "fewer_keys": Case(((150, 67),), D=72, B=1),  # the first queries see nothing
    "group": Case(((40, 75),), H=6, G=2, D=80, B=1),
    "gaps": Case(((33, 50),), H=2, G=2, D=64, B=2, gap=24),
    "no_keys": Case(((5, 0),), B=1),
    "negative_scale": Case(((40, 70),), D=64, B=1, scale=-0.2),
    "zero_scale": Case(((40, 70),), D=64, B=1, scale=0.0),
    "lse_gradient": Case(((40, 70),), D=64, causal=False, B=1, dlse=True),
    "pack": Case(((37, 37), (0, 5), (1, 1), (5, 0), (0, 0), (130, 130), (3, 90), (60, 20)), D=64),
    "full_pack": Case(((37, 50), (0, 5), (1, 1), (5, 0), (90, 30)), H=4, G=2, D=128, causal=False, dlse=True),
    "many_sequences": Case(tuple((i % 3, 20 + i % 4) for i in range(40)), H=1, D=64, causal=False),
}
DECODES = {
    "one": Case(((1, 300),), H=4, G=1, D=128, B=2),
    "eight": Case(((8, 200),), H=32, G=2, D=64, B=1),  # two blocks of rows
    "full": Case(((5, 130),), H=6, G=2, D=80, causal=False, B=1),
    "pack": Case(((1, 300), (0, 40), (8, 3), (2, 0), (3, 129)), H=4, G=2, D=96),
}
SPLITS = (5, 64)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> emulated.Library:
    return emulated.compile(SOURCE, tmp_path_factory.mktemp("emulated"))


def run(library: emulated.Library, case: Case, x: Inputs, seed: int = 0) -> Outputs:
    return backward(library, case, x, forward(library, case, x, seed), seed)


@dtypes
@pytest.mark.parametrize("name", CASES)
def test_accuracy(library: emulated.Library, dtype: torch.dtype, name: str) -> None:
    x = inputs(CASES[name], dtype)
    assert_accurate(run(library, CASES[name], x, seed=len(name)), CASES[name], x)


@dtypes
@pytest.mark.parametrize("name", DECODES)
def test_decode(library: emulated.Library, dtype: torch.dtype, name: str) -> None:
    x = inputs(DECODES[name], dtype)
    assert_accurate(decode(library, DECODES[name], x, SPLITS, seed=len(name)), DECODES[name], x)


def test_repeatable(library: emulated.Library) -> None:
    """Bitwise the same in any order of threads and blocks."""
    case, few = CASES["pack"], DECODES["pack"]
    x, y = inputs(case, torch.bfloat16), inputs(few, torch.bfloat16)
    first, first_few = run(library, case, x), decode(library, few, y, SPLITS)
    for seed in range(1, 4):
        for a, b in zip(run(library, case, x, seed), first, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(decode(library, few, y, SPLITS, seed)[:2], first_few[:2], strict=True):
            assert torch.equal(a, b)


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
        made = forward(library, case, x, cu=cu)
        backward(library, case, x, Outputs(made.out.nan_to_num(), made.lse.nan_to_num()), cu=cu)
        decode(library, case, x, (2, 64), cu=cu)


def test_splits() -> None:
    """Splits cover the keys, each but the last whole, and none is empty."""
    for keys in (1, 255, 256, 257, 4096, 100_001):
        for blocks in (1, 8, 500):
            splits, chunk = internals.plan_splits(keys, blocks, 108, 256)
            assert chunk % 256 == 0 and (splits - 1) * chunk < keys <= splits * chunk
            assert splits == 1 or (splits - 1) * blocks < 2 * 108


@pytest.fixture
def library_of_operators() -> Iterator[None]:
    with emulated_library.emulated():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("S, L, G, D", [(130, 140, 2, 64), (3, 600, 1, 80)], ids=["blocks", "splits"])
def test_operators(library_of_operators: None, S: int, L: int, G: int, D: int) -> None:
    """The host's checks, choice and launches, from the public functions."""
    q = testing.random(2, S, 4, D, dtype=torch.bfloat16).requires_grad_()
    k, v = (testing.random(2, L, G, D, dtype=torch.bfloat16, seed=s).requires_grad_() for s in (1, 2))
    testing.check_op(sail_ops.attention, reference.attention, q, k, v, causal=True)
    cu = [torch.tensor([0, n // 3, n // 3, n], dtype=torch.int32) for n in (S, L)]
    pack = [t[0].detach().requires_grad_() for t in (q, k, v)]
    testing.check_op(sail_ops.attention_varlen, reference.attention_varlen, *pack, *cu, S, L)


@pytest.mark.slow
def test_errors(library_of_operators: None) -> None:
    q, k = torch.zeros(1, 5, 4, 80, dtype=torch.bfloat16), torch.zeros(1, 7, 2, 80, dtype=torch.bfloat16)
    shifted = torch.zeros(1, 5, 4, 84, dtype=torch.bfloat16)[..., 4:]
    cases = {
        "q: got float32, expected bfloat16 or float16": (q.float(), k.float(), k.float()),
        "q: got a head dim of 60, expected a multiple of 8": (q[..., :60], k[..., :60], k[..., :60]),
        "k: got shape .* expected a head dim of 80": (q, k[..., :72], k[..., :72]),
        "q: got 3 heads, expected a multiple of k's 2": (q[:, :, :3], k, k),
        "v: got shape .* expected k's shape": (q, k, k[:, :5]),
        "q: got strides .* expected contiguous rows .* on 16 bytes": (shifted, k, k),
    }
    for said, arguments in cases.items():
        with pytest.raises(ValueError, match=said):
            sail_ops.attention(*arguments)


FORWARD, BACKWARD, TILE = (f"attention_{part}_sm80.cuh" for part in ("forward", "backward", "tile"))
SOFTMAX = "attention_softmax.cuh"
MUTANTS = {
    "a tile is not waited for": (FORWARD, "cp_async_wait<Shape::kSlots - 2>", "cp_async_wait<9>"),
    "a slot is used again too early": (FORWARD, "- 2>();\n    __syncthreads();", "- 2>();"),
    "queries see a key too many": (FORWARD, "w.behind) - (w.n1", "w.behind + 1) - (w.n1"),
    "the last key is not seen": (FORWARD, "min(w.n1 - 1,", "min(w.n1 - 2,"),
    "old sums keep their scale": (SOFTMAX, "changed || m != old", "changed"),
    "dq does not wait": (
        BACKWARD,
        "wait<Shape::kSlots - 2>();\n    __syncthreads();\n    const uint32_t other",
        "wait<9>();\n    __syncthreads();\n    const uint32_t other",
    ),
    "dq sees a key too many": (BACKWARD, "w.behind) - (w.n1", "w.behind + 1) - (w.n1"),
    "dk sees a query too many": (BACKWARD, "e % 2) > behind", "e % 2) > behind + 1"),
    "dk skips the first queries": (BACKWARD, "block.first - behind) /", "block.first + 32 - behind) /"),
    "a head of the group is left out": (BACKWARD, "? group * (", "? max(1, group - 1) * ("),
    "delta forgotten": (BACKWARD, "(e % 2 ? at.w : at.y)", "0.f"),
    "dlse forgotten": (BACKWARD, "a.dlse ? sum - a.dlse[at]", "a.dlse ? sum"),
    "tails left out": (TILE, "row < rows && (across", "(across"),
    "head dims not filled up": (TILE, " && (across + right) * 8 < D", ""),
}
CHECKS = ("tails", "group", "fewer_keys", "lse_gradient")


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(tmp_path: Path, name: str) -> None:
    file, old, new = MUTANTS[name]

    def mutate(kernels: Path) -> None:
        emulated.replace_once(kernels / file, old, new)
        dispatch = kernels / "attention_dispatch_sm80.cuh"  # every head dim in the widest kernels, for speed
        dispatch.write_text(re.sub(r"  if \(D <= \d+\) return .*\n", "", dispatch.read_text()))

    broken = emulated.compile(SOURCE, tmp_path, "SAIL_ONLY_BF16", mutate=mutate)
    with pytest.raises(AssertionError):
        for check in CHECKS:
            x = inputs(CASES[check], torch.bfloat16)
            assert_accurate(run(broken, CASES[check], x), CASES[check], x)
