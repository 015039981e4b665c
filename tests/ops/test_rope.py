"""rope and qk_norm_rope: accuracy of outputs and gradients, layouts, tables, tracing, errors."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import sail_ops
from sail_ops import reference, testing

DTYPES = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)


class Case(NamedTuple):
    """Tokens, H query heads, G key heads, A head dim."""

    tokens: tuple[int, ...]
    H: int
    G: int
    A: int


CASES = {
    "empty": Case((0,), 2, 1, 64),
    "one_token": Case((1, 1), 1, 1, 64),
    "model": Case((2, 37), 8, 2, 128),
    "odd_half": Case((41,), 3, 3, 70),
    "tiny": Case((67,), 4, 1, 2),
    "wide": Case((19,), 2, 1, 256),
}
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def tables(case: Case, dtype: torch.dtype = torch.float32, half: bool = False) -> tuple[Tensor, Tensor]:
    """cos and sin of one sequence, repeated over the batch, as transformers makes them: [1, S, A] or [S, A]."""
    S = case.tokens[-1]
    angles = torch.arange(S)[:, None] / 1e4 ** (torch.arange(0, case.A, 2) / case.A)
    angles = angles if half else torch.cat((angles, angles), -1)
    angles = angles[None] if len(case.tokens) > 1 else angles
    return angles.cos().to(dtype), angles.sin().to(dtype)


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and the norms' weights."""
    q = testing.random(*case.tokens, case.H, case.A, dtype=dtype)
    k = testing.random(*case.tokens, case.G, case.A, dtype=dtype, seed=1)
    q_weight, k_weight = ((1 + testing.random(case.A, scale=0.2, seed=s)).to(dtype) for s in (2, 3))
    return q.requires_grad_(), k.requires_grad_(), q_weight.requires_grad_(), k_weight.requires_grad_()


@EACH_CASE
@DTYPES
def test_accuracy(isa: str, dtype: torch.dtype, case: Case) -> None:
    q, k, q_weight, k_weight = inputs(case, dtype)
    cos, sin = tables(case)
    testing.check_op(sail_ops.rope, reference.rope, q, k, cos, sin)
    if case.A > 2:  # the norm of two elements is a sign: it has next to no gradient
        pool = {"args[0]": case.H, "args[1]": case.G}
        args = q, k, q_weight, k_weight, cos, sin
        testing.check_op(sail_ops.qk_norm_rope, reference.qk_norm_rope, *args, pool=pool)


@DTYPES
def test_tables_of_any_form(isa: str, dtype: torch.dtype) -> None:
    case = CASES["model"]
    q, k, *weights = inputs(case, dtype)
    want = sail_ops.qk_norm_rope(q, k, *weights, *tables(case))
    rows = [t[0] for t in tables(case)]
    positions = torch.arange(37).expand(2, -1)
    shuffled = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    scattered = [torch.zeros(50, case.A).index_copy(0, shuffled, t) for t in rows]
    forms: dict[str, tuple[Any, ...]] = {
        "halves": (*tables(case, half=True),),
        "no_batch": (*rows,),
        "full_batch": tuple(t.expand(2, -1, -1) for t in tables(case)),
        "positions": (*rows, 1e-6, positions),
        "int32_positions": (*rows, 1e-6, positions[:1].int()),
        "scattered": (*scattered, 1e-6, shuffled),
    }
    for name, form in forms.items():
        for got, w in zip(sail_ops.qk_norm_rope(q, k, *weights, *form), want, strict=True):
            assert torch.equal(got, w), name
    testing.check_op(sail_ops.rope, reference.rope, q, k, *tables(case, torch.bfloat16))
    testing.check_op(sail_ops.rope, reference.rope, q, k, rows[0], rows[1], positions)


@DTYPES
def test_halves_of_the_tables_may_differ(isa: str, dtype: torch.dtype) -> None:
    q, k, q_weight, k_weight = inputs(CASES["odd_half"], dtype)
    cos, sin = (testing.random(41, 70, seed=s) for s in (7, 8))
    testing.check_op(sail_ops.rope, reference.rope, q, k, cos, sin)
    testing.check_op(sail_ops.qk_norm_rope, reference.qk_norm_rope, q, k, q_weight, k_weight, cos, sin)


def test_views_are_read_in_place(isa: str) -> None:
    """Of a fused projection [B, S, H + 2G, A], and of heads before tokens."""
    case = CASES["model"]
    qkv = testing.random(2, 37, 12, 128).requires_grad_()
    _, _, *weights = inputs(case, torch.float32)
    args = *weights, *tables(case)

    def fused(function: Any) -> Any:
        return lambda qkv, *rest: function(qkv[:, :, :8], qkv[:, :, 8:10], *rest)

    testing.check_op(fused(sail_ops.qk_norm_rope), fused(reference.qk_norm_rope), qkv, *args)
    q, k = qkv.detach()[:, :, :8], qkv.detach()[:, :, 8:10]
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k)]
    for got, want in zip(sail_ops.rope(*heads_first, *args[2:]), sail_ops.rope(q, k, *args[2:]), strict=True):
        assert torch.equal(got, want) and got.is_contiguous()


def test_gradients_of_any_strides() -> None:
    """What attention sends back may be transposed, and a sum sends one number for all."""
    case = CASES["model"]
    q, k, *weights = inputs(case, torch.float32)

    def transposed(function: Any) -> Any:
        return lambda *args: tuple(t.transpose(1, 2).contiguous() for t in function(*args))

    args = q, k, *weights, *tables(case)
    testing.check_op(transposed(sail_ops.qk_norm_rope), transposed(reference.qk_norm_rope), *args)
    got, want = (
        torch.autograd.grad(sum(t.sum() for t in function(*args)), args[:4])
        for function in (sail_ops.qk_norm_rope, reference.qk_norm_rope)
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("which", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (1, 1, 0, 0), (0, 1, 0, 1)])
def test_only_wanted_gradients(which: tuple[int, ...]) -> None:
    case = CASES["model"]
    args = [t.requires_grad_(bool(w)) for t, w in zip(inputs(case, torch.float32), which, strict=True)]

    def one_output(function: Any) -> Any:  # the other has no gradient to send
        return lambda *a: function(*a)[0 if which[0] or which[2] else 1]

    pool = {"args[0]": case.H, "args[1]": case.G}  # a head's gradient shares the error of its mean
    both = one_output if not (which[0] and which[1]) else lambda f: f
    testing.check_op(both(sail_ops.qk_norm_rope), both(reference.qk_norm_rope), *args, *tables(case), pool=pool)
    if which[0] or which[1]:
        testing.check_op(both(sail_ops.rope), both(reference.rope), *args[:2], *tables(case))


def test_same_bits_every_time_and_for_any_number_of_threads(isa: str) -> None:
    case = Case((131,), 8, 2, 64)
    args = *inputs(case, torch.bfloat16), *tables(case)
    testing.check_repeatable(sail_ops.qk_norm_rope, *args)
    first = testing.run(sail_ops.qk_norm_rope, *args)
    before = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            testing.assert_same(testing.run(sail_ops.qk_norm_rope, *args), first)
    finally:
        torch.set_num_threads(before)


def test_tracing() -> None:
    case = CASES["model"]
    q, k, *weights = inputs(case, torch.bfloat16)
    testing.check_traceable(sail_ops.rope, q, k, *tables(case))
    testing.check_traceable(sail_ops.qk_norm_rope, q, k, *weights, *tables(case))


def test_opcheck() -> None:
    case = CASES["model"]
    q, k, *weights = (t.detach() for t in inputs(case, torch.float32))
    ops, cos_sin = torch.ops.sail_ops, tables(case)
    positions = torch.arange(37)
    for transpose in (False, True):
        torch.library.opcheck(ops.rope.default, (q, k, *cos_sin, None, transpose))
    torch.library.opcheck(ops.qk_norm_rope.default, (q, k, *weights, *(t[0] for t in cos_sin), positions, 1e-6))
    for need in (True, False):
        torch.library.opcheck(ops.qk_norm_rope_backward.default, (q, k, q, k, *weights, *cos_sin, None, 1e-6, need))


def test_reference_gradients() -> None:
    case = Case((3,), 2, 1, 4)
    wide = [t.detach().double().requires_grad_() for t in inputs(case, torch.float32)]
    cos_sin = [t.double() for t in tables(case)]
    assert torch.autograd.gradcheck(lambda *a: reference.qk_norm_rope(*a, *cos_sin), wide)


def test_autocast_casts_the_weights() -> None:
    case = CASES["model"]
    q, k, *_ = (t.detach() for t in inputs(case, torch.bfloat16))
    with torch.autocast(q.device.type, torch.bfloat16):
        got, _ = sail_ops.qk_norm_rope(q, k, torch.ones(128), torch.ones(128), *tables(case))
    assert got.dtype == torch.bfloat16


Q, K, C, W = torch.ones(3, 4, 8), torch.ones(3, 2, 8), torch.ones(3, 8), torch.ones(8)
ERRORS = {
    "rank": (lambda: sail_ops.rope(Q[0], K[0], C, C), r"rope: q: got shape \[4, 8\], expected 3 to 8 dimensions"),
    "odd": (lambda: sail_ops.rope(Q[..., :7], K[..., :7], C[:, :7], C[:, :7]), "q: got A = 7, expected an even A"),
    "k_tokens": (lambda: sail_ops.rope(Q, K[:2], C, C), r"k: got shape \[2, 2, 8\], expected dimensions that fit"),
    "k_width": (lambda: sail_ops.rope(Q, K[..., :4], C, C), r"k: got shape \[3, 2, 4\], expected q's tokens"),
    "k_dtype": (lambda: sail_ops.rope(Q, K.half(), C, C), "k: got float16, expected float32"),
    "q_dtype": (lambda: sail_ops.rope(Q.long(), K.long(), C, C), "q: got int64, expected float32, bfloat16 or"),
    "strides": (lambda: sail_ops.rope(Q.transpose(1, 2), K.transpose(1, 2), C, C), "q: got stride|k: got shape"),
    "table_width": (
        lambda: sail_ops.rope(Q, K, C[:, :6], C[:, :6]),
        "cos: got shape .*, expected rows of A = 8 or A/2",
    ),
    "table_rows": (lambda: sail_ops.rope(Q, K, C[:2], C[:2]), r"cos: got shape \[2, 8\], expected dimensions that fit"),
    "sin_shape": (lambda: sail_ops.rope(Q, K, C, C[:, :4]), r"sin: got shape \[3, 4\], expected cos's shape"),
    "sin_dtype": (lambda: sail_ops.rope(Q, K, C, C.half()), "sin: got float16, expected float32"),
    "position_high": (lambda: sail_ops.rope(Q, K, C, C, torch.tensor([0, 3, 1])), r"positions: got 3, expected rows"),
    "position_low": (lambda: sail_ops.rope(Q, K, C, C, torch.tensor([0, -1, 1])), r"positions: got -1, expected rows"),
    "position_dtype": (lambda: sail_ops.rope(Q, K, C, C, C[:, 0]), "positions: got float32, expected int32 or int64"),
    "position_shape": (lambda: sail_ops.rope(Q, K, C, C, torch.zeros(2).long()), r"positions: got shape \[2\]"),
    "weight_shape": (lambda: sail_ops.qk_norm_rope(Q, K, W[:7], W, C, C), r"q_weight_A: got shape \[7\], expected"),
    "weight_dtype": (lambda: sail_ops.qk_norm_rope(Q, K, W, W.half(), C, C), "k_weight_A: got float16, expected"),
}


@pytest.mark.parametrize("call, message", ERRORS.values(), ids=ERRORS.keys())
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
