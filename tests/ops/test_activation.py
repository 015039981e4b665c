"""swiglu: accuracy of output and gradients, views, edges, tracing, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sail_ops
from sail_ops import reference, testing

DTYPES = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
SHAPES = {
    "empty": (0, 64),
    "one": (1, 1),
    "odd": (199, 77),
    "three_dims": (3, 11, 128),
    "model": (199, 768),
    "two_pieces": (1, 20000),
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gate, up = testing.random(*shape, dtype=dtype, scale=2), testing.random(*shape, dtype=dtype, seed=1)
    return gate.requires_grad_(), up.requires_grad_()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@DTYPES
def test_accuracy(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    testing.check_op(sail_ops.swiglu, reference.swiglu, *inputs(shape, dtype))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 40), F=st.integers(1, 200), scale=st.sampled_from([1e-3, 1.0, 20.0]))
def test_any_shape_and_scale(rows: int, F: int, scale: float) -> None:
    gate = testing.random(rows, 64 * F, scale=scale).requires_grad_()
    up = testing.random(rows, 64 * F, seed=1).requires_grad_()
    testing.check_op(sail_ops.swiglu, reference.swiglu, gate[:, :F], up[:, F : 2 * F], k=testing.CHANCE)


@DTYPES
def test_halves_of_one_tensor_are_read_in_place(isa: str, dtype: torch.dtype) -> None:
    both = testing.random(67, 2 * 97, dtype=dtype, scale=2)
    gate, up = both.chunk(2, -1)
    want = sail_ops.swiglu(gate.contiguous(), up.contiguous())
    got = sail_ops.swiglu(gate, up)
    assert torch.equal(got, want) and got.is_contiguous()
    testing.check_op(
        lambda t: sail_ops.swiglu(*t.chunk(2, -1)), lambda t: reference.swiglu(*t.chunk(2, -1)), both.requires_grad_()
    )


def test_range_of_silu(isa: str) -> None:
    gate = torch.linspace(-110, 110, 4001).requires_grad_()
    testing.check_op(sail_ops.swiglu, reference.swiglu, gate, torch.ones_like(gate))


def test_non_finite_values_as_in_torch(isa: str) -> None:
    gate = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 1.0, 1.0])
    up = torch.tensor([1.0, 1.0, 1.0, math.nan, math.inf, -math.inf])
    got, want = sail_ops.swiglu(gate, up), reference.swiglu(gate, up)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


def test_same_bits_every_time_and_for_any_number_of_threads(isa: str) -> None:
    args = inputs((333, 200), torch.bfloat16)
    testing.check_repeatable(sail_ops.swiglu, *args)
    first = testing.run(sail_ops.swiglu, *args)
    before = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            testing.assert_same(testing.run(sail_ops.swiglu, *args), first)
    finally:
        torch.set_num_threads(before)


def test_tracing() -> None:
    testing.check_traceable(sail_ops.swiglu, *inputs((5, 64), torch.bfloat16))


def test_opcheck() -> None:
    gate, up = (t.detach() for t in inputs((5, 64), torch.float32))
    torch.library.opcheck(torch.ops.sail_ops.swiglu.default, (gate, up))
    torch.library.opcheck(torch.ops.sail_ops.swiglu_backward.default, (gate, gate, up))


def test_reference_gradients() -> None:
    gate, up = (t.detach().double().requires_grad_() for t in inputs((3, 7), torch.float32))
    assert torch.autograd.gradcheck(reference.swiglu, (gate, up))


@pytest.mark.cpu_only
def test_autocast_promotes() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert sail_ops.swiglu(torch.ones(2, 8), torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.float32


def test_activation_checkpointing() -> None:
    args = inputs((9, 64), torch.float32)

    def checkpointed(*args: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(sail_ops.swiglu, *args, use_reentrant=False)

    testing.assert_same(testing.run(checkpointed, *args), testing.run(sail_ops.swiglu, *args))


X = torch.ones(2, 8)
ERRORS = {
    "shape": (lambda: sail_ops.swiglu(X, X[:1]), r"swiglu: up: got shape \[1, 8\], expected shape \[2, 8\]"),
    "dtype": (lambda: sail_ops.swiglu(X, X.bfloat16()), "up: got bfloat16, expected float32"),
    "gate_dtype": (lambda: sail_ops.swiglu(X.long(), X), "gate: got int64, expected float32, bfloat16 or float16"),
    "strides": (lambda: sail_ops.swiglu(X, torch.ones(8, 2).t()), "up: got stride 2, expected contiguous rows"),
    "no_columns": (lambda: sail_ops.swiglu(X[:, :0], X[:, :0]), "gate: got D = 0"),
    "scalar": (lambda: sail_ops.swiglu(X[0, 0], X[0, 0]), r"gate: got shape \[\]"),
}


@pytest.mark.parametrize("call, message", ERRORS.values(), ids=ERRORS.keys())
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
