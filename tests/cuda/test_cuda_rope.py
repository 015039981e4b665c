"""rope's and qk_norm_rope's CUDA sources, host and kernels, on the emulator: layouts, tables and head dims."""

from collections.abc import Iterator

import cuda_mutants
import pytest
import torch
from conftest import DEVICE
from cuda_mutants import Mutant
from emulated_library import emulated
from torch import Tensor

import sail_ops
from sail_ops import reference, testing

SOURCES = ("rope", "card")
DTYPES = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
# tokens, heads of q and of k, head dim: 4, 8 and 32 lanes a head; single elements where half a head is no whole vector
CASES = {
    "one_token": ((1, 1), 1, 1, 64),
    "model": ((2, 19), 8, 2, 128),
    "uneven_items": ((41,), 7, 3, 64),
    "single_elements": ((23,), 5, 2, 72),
    "tiny": ((67,), 4, 1, 6),
    "wide": ((5,), 2, 1, 512),
    "several_blocks": ((200,), 2, 1, 64),
}


@pytest.fixture(autouse=True)
def cuda() -> Iterator[None]:
    if DEVICE != "cpu":  # conftest has seen to it
        yield
        return
    with emulated(only=SOURCES):
        yield


def inputs(case: tuple, dtype: torch.dtype) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """q, k and the weights; cos and sin, whose halves differ so that none can stand for another."""
    tokens, H, G, A = case
    q, k = (testing.random(*tokens, h, A, dtype=dtype, seed=i) for i, h in enumerate((H, G)))
    weights = ((1 + testing.random(A, scale=0.2, seed=s)).to(dtype) for s in (2, 3))
    angles = testing.random(*tokens, A, seed=4)
    return [t.requires_grad_() for t in (q, k, *weights)], (angles.cos(), angles.sin())


def pools(case: tuple) -> dict[str, int]:
    """A head's gradient shares the error of its norm."""
    return {"args[0]": case[1], "args[1]": case[2]}


def check_all(case: tuple, dtype: torch.dtype) -> None:
    (q, k, *weights), tables = inputs(case, dtype)
    testing.check_op(sail_ops.rope, reference.rope, q, k, *tables)
    testing.check_op(sail_ops.qk_norm_rope, reference.qk_norm_rope, q, k, *weights, *tables, pool=pools(case))


@DTYPES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_accuracy(dtype: torch.dtype, case: tuple) -> None:
    check_all(case, dtype)


@DTYPES
@pytest.mark.parametrize("table", testing.DTYPES, ids=str)
def test_tables_of_every_dtype(dtype: torch.dtype, table: torch.dtype) -> None:
    (q, k, *weights), tables = inputs(CASES["model"], dtype)
    tables = tuple(t.to(table) for t in tables)
    testing.check_op(sail_ops.qk_norm_rope, reference.qk_norm_rope, q, k, *weights, *tables, pool=pools(CASES["model"]))


def test_tables_of_every_form_give_the_same_bits() -> None:
    case = CASES["model"]
    (q, k, *weights), tables = inputs(case, torch.bfloat16)
    halves = [t[:1, :, :64] for t in tables]  # of one sequence, [1, S, A/2]
    want = testing.run(
        sail_ops.qk_norm_rope, q, k, *weights, *(torch.cat((t, t), -1).expand(2, -1, -1) for t in halves)
    )
    order = torch.randperm(19, generator=torch.Generator().manual_seed(0))
    scattered = [torch.full((30, 64), torch.nan).index_copy(0, order, t[0]) for t in halves]
    forms = [
        (*halves, 1e-6),
        (*(t[0] for t in halves), 1e-6),
        (*(t[0] for t in halves), 1e-6, torch.arange(19).expand(2, -1)),
        (*scattered, 1e-6, order),
        (*scattered, 1e-6, order[None].int()),
    ]
    for form in forms:
        testing.assert_same(testing.run(sail_ops.qk_norm_rope, q, k, *weights, *form), want)


def test_views_are_read_in_place() -> None:
    """Of one fused projection, of [B, H, S, A], and off 16 bytes."""
    fused, weights = testing.random(2, 9, 12, 128), [1 + testing.random(128, seed=s) for s in (1, 2)]
    tables = [testing.random(9, 128, seed=s) for s in (3, 4)]
    by_head = testing.random(2, 8, 9, 128, seed=5).transpose(1, 2)
    shifted = testing.random(2, 9, 8, 129, seed=6)[..., 1:]
    for q in (fused[:, :, :8], by_head, shifted):
        k = fused[:, :, 8:10]
        views = testing.run(sail_ops.qk_norm_rope, q.requires_grad_(), k, *weights, *tables)
        copies = testing.run(sail_ops.qk_norm_rope, q.detach().clone().requires_grad_(), k, *weights, *tables)
        torch.testing.assert_close(views.outputs, copies.outputs)
        torch.testing.assert_close(views.gradients, copies.gradients)


@pytest.mark.parametrize("case", [CASES["model"], CASES["single_elements"], CASES["several_blocks"]], ids=str)
def test_any_order_of_threads_gives_the_same_bits(case: tuple) -> None:
    (q, k, *weights), tables = inputs(case, torch.bfloat16)
    testing.check_repeatable(sail_ops.qk_norm_rope, q, k, *weights, *tables, times=4)


def test_a_position_out_of_range_reads_nothing() -> None:
    if DEVICE != "cpu":
        pytest.skip("checked under SAIL_OPS_CHECK=1, which tests of a device set")
    q, table = testing.random(5, 2, 64), torch.ones(4, 64)
    y, _ = sail_ops.rope(q, q, table, 0 * table, torch.tensor([0, 3, -1, 4, 2**40]))
    assert torch.equal(y[:2], q[:2]) and y[2:].isnan().all()


ERRORS = {
    "head_dim": ((torch.ones(3, 2, 514), torch.ones(3, 514)), "q: got A = 514, expected at most 512"),
    "odd_head_dim": ((torch.ones(3, 2, 7), torch.ones(3, 7)), "q: got A = 7, expected an even A"),
    "table_width": ((torch.ones(3, 2, 64), torch.ones(3, 16)), r"cos: got shape \[3, 16\], expected rows of A = 64"),
    "table_tokens": ((torch.ones(3, 2, 64), torch.ones(4, 64)), "cos: got shape .* expected dimensions that fit"),
}


@pytest.mark.parametrize("args, message", ERRORS.values(), ids=ERRORS.keys())
def test_bad_input(args: tuple[Tensor, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sail_ops.rope(args[0], args[0], args[1], args[1])


def check_case() -> None:
    for name in ("uneven_items", "single_elements", "several_blocks"):
        check_all(CASES[name], torch.float32)


ROPE = "kernels/rope.cuh"
MUTANTS = {
    "sines of the halves swapped": Mutant(
        ROPE,
        "low = l * cos_low.v[i][j] - h * sin_low.v[i][j]",
        "low = l * cos_low.v[i][j] - h * sin_high.v[i][j]",
        check_case,
    ),
    "rotated back the wrong way": Mutant(
        ROPE, "l * cos_low.v[i][j] + h * sin_high", "l * cos_low.v[i][j] - h * sin_high", check_case
    ),
    "heads past the first four dropped": Mutant(
        ROPE, "item % per_token) * kRopeHeads", "item % 1) * kRopeHeads", check_case
    ),
    "no mean term in dx": Mutant(
        ROPE, "x_low[j] = fmaf(-x_low[j], slope, ", "x_low[j] = fmaf(-x_low[j], 0.f, ", check_case
    ),
    "idle lanes add to dweight": Mutant(ROPE, "kRopeBack : heads", "kRopeBack : 0", check_case),
    "k's sums in q's order": Mutant(
        "rope.cu", "column_sum(k_partial, dk_weight)", "column_sum(q_partial, dk_weight)", check_case
    ),
}


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return cuda_mutants.failures("test_cuda_rope")


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="mutants are emulated")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(failures: dict[str, str], name: str) -> None:
    assert failures[name] and not failures["none"]
