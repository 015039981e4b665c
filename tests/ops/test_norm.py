"""rms_norm and add_rms_norm: accuracy of outputs and gradients, edges, tracing, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sail_ops
from sail_ops import reference, testing

DTYPES = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
SHAPES = pytest.mark.parametrize("shape", testing.NORM_SHAPES.values(), ids=testing.NORM_SHAPES.keys())


def inputs(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual and weight."""
    x, residual = testing.random(*shape), testing.random(*shape, seed=1)
    weight = 1 + testing.random(shape[-1], scale=0.2, seed=2)
    x, residual, weight = ((t * s).to(dtype) for t, s in ((x, scale), (residual, scale), (weight, 1)))
    return x.requires_grad_(), residual.requires_grad_(), weight.requires_grad_()


@SHAPES
@DTYPES
def test_accuracy(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual, weight = inputs(shape, dtype)
    testing.check_op(sail_ops.rms_norm, reference.rms_norm, x, weight)
    testing.check_op(sail_ops.add_rms_norm, reference.add_rms_norm, x, residual, weight)


def one_by_one(fn):
    """fn over a batch of problems: one weight's gradient has so few elements that its error is a matter of chance."""

    def call(*batches: Tensor):
        results = [fn(*problem) for problem in zip(*batches, strict=True)]
        if isinstance(results[0], Tensor):
            return torch.stack(results)
        return tuple(torch.stack(r) for r in zip(*results, strict=True))

    return call


@pytest.mark.parametrize("D", [1, 7, 33])
@DTYPES
def test_few_columns(isa: str, dtype: torch.dtype, D: int) -> None:
    n = testing.MIN_ROW // D + 1
    # of about one and two: 1/rms of a row near zero would outweigh all others in every error
    x = (testing.random(n, 67, D).sign() * (1 + testing.random(n, 67, D, seed=1).sigmoid())).to(dtype)
    residual = (0.2 * x.abs()).detach().requires_grad_()
    weight = (1 + testing.random(n, D, scale=0.2, seed=2)).to(dtype).requires_grad_()
    x.requires_grad_()
    testing.check_op(one_by_one(sail_ops.rms_norm), one_by_one(reference.rms_norm), x, weight)
    testing.check_op(one_by_one(sail_ops.add_rms_norm), one_by_one(reference.add_rms_norm), x, residual, weight)


@DTYPES
def test_small_values_show_eps(isa: str, dtype: torch.dtype) -> None:
    x, residual, weight = inputs((33, 256), dtype, scale=1e-2)
    pool = dict.fromkeys(("outputs[0]", "outputs[1]", "args[0]", "args[1]"), 33)  # a row shares the error of its scale
    for eps in (1e-6, 1e-5):
        testing.check_op(sail_ops.rms_norm, reference.rms_norm, x, weight, eps, pool=pool)
        testing.check_op(sail_ops.add_rms_norm, reference.add_rms_norm, x, residual, weight, eps, pool=pool)
    with pytest.raises(AssertionError, match="budget"):
        testing.check_op(lambda x, w: sail_ops.rms_norm(x, w, 1e-5), reference.rms_norm, x, weight)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 70), D=st.integers(8, 300), seed=st.integers(0, 9))
def test_any_shape(rows: int, D: int, seed: int) -> None:
    x = testing.random(rows, D, seed=seed).requires_grad_()
    weight = testing.random(D, seed=seed + 1).requires_grad_()
    testing.check_op(sail_ops.rms_norm, reference.rms_norm, x, weight, k=testing.CHANCE)


VIEWS = {
    "column_slice": lambda t: t[:, :77],
    "row_stride_0": lambda t: t[:1].expand(40, -1),
    "transposed_leading": lambda t: t.reshape(8, 5, 154).transpose(0, 1),
    "every_third": lambda t: t.reshape(2, 4, 5, 154)[:, ::3, ::2],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_are_read_in_place(isa: str, view) -> None:
    x = view(testing.random(40, 154))
    residual, weight = view(testing.random(40, 154, seed=1)), testing.random(x.shape[-1], seed=2)
    assert torch.equal(sail_ops.rms_norm(x, weight), sail_ops.rms_norm(x.contiguous(), weight))
    for a, b in zip(
        sail_ops.add_rms_norm(x, residual, weight),
        sail_ops.add_rms_norm(x.contiguous(), residual.contiguous(), weight),
        strict=True,
    ):
        assert torch.equal(a, b) and a.is_contiguous()
    x, weight = x.detach().requires_grad_(), weight.requires_grad_()
    testing.check_op(sail_ops.rms_norm, reference.rms_norm, x, weight)


@pytest.mark.parametrize("which", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)])
def test_only_wanted_gradients(which: tuple[int, ...]) -> None:
    args = [t.requires_grad_(bool(w)) for t, w in zip(inputs((9, 64), torch.float32), which, strict=True)]
    testing.check_op(sail_ops.add_rms_norm, reference.add_rms_norm, *args)
    if which[0] or which[2]:
        testing.check_op(sail_ops.rms_norm, reference.rms_norm, args[0], args[2])


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_outputs_used(used: int) -> None:
    ours, theirs = (lambda *args, f=f: f(*args)[used] for f in (sail_ops.add_rms_norm, reference.add_rms_norm))
    testing.check_op(ours, theirs, *inputs((9, 64), torch.float32), k=testing.CHANCE)  # rows of 64 numbers


def test_gradients_accumulate_in_leaves() -> None:
    x, residual, weight = inputs((9, 64), torch.float32)
    normed, total = sail_ops.add_rms_norm(x, residual, weight)
    (normed.sum() + total.sum()).backward()
    assert x.grad is not None and residual.grad is not None
    assert torch.equal(x.grad, residual.grad) and x.grad.data_ptr() != residual.grad.data_ptr()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_stay_in_their_row(isa: str, bad: float) -> None:
    x = testing.random(4, 40)
    x[2, 39] = bad
    y, want = sail_ops.rms_norm(x, torch.ones(40)), reference.rms_norm(x, torch.ones(40))
    assert torch.equal(y.isfinite(), want.isfinite()) and torch.equal(y.isnan(), want.isnan())


@DTYPES
def test_tiny_and_zero_values(isa: str, dtype: torch.dtype) -> None:
    x = torch.zeros(3, 100, dtype=dtype)
    x[1] = torch.finfo(dtype).tiny
    weight = torch.ones(100, dtype=dtype)
    testing.assert_accurate(
        sail_ops.rms_norm(x, weight), reference.rms_norm(x.double(), weight.double()), reference.rms_norm(x, weight)
    )


def test_same_bits_every_time_and_for_any_number_of_threads(isa: str) -> None:
    x, residual, weight = inputs((333, 200), torch.bfloat16)
    testing.check_repeatable(sail_ops.add_rms_norm, x, residual, weight)
    first = testing.run(sail_ops.add_rms_norm, x, residual, weight)
    before = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            testing.assert_same(testing.run(sail_ops.add_rms_norm, x, residual, weight), first)
    finally:
        torch.set_num_threads(before)


def test_tracing() -> None:
    x, residual, weight = inputs((5, 64), torch.bfloat16)
    testing.check_traceable(sail_ops.rms_norm, x, weight)
    testing.check_traceable(sail_ops.add_rms_norm, x, residual, weight)


def test_opcheck() -> None:
    x, residual, weight = (t.detach() for t in inputs((5, 64), torch.float32))
    ops = torch.ops.sail_ops
    torch.library.opcheck(ops.rms_norm.default, (x, weight, 1e-6))
    torch.library.opcheck(ops.add_rms_norm.default, (x, residual, weight, 1e-6))
    for grad_sum in (None, residual):
        for need_dx, need_dweight in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                ops.rms_norm_backward.default, (x, grad_sum, residual, weight, 1e-6, need_dx, need_dweight)
            )


def test_reference_gradients() -> None:
    x, residual = (testing.random(3, 7, seed=i).double().requires_grad_() for i in range(2))
    weight = testing.random(7, seed=2).double().requires_grad_()
    assert torch.autograd.gradcheck(reference.rms_norm, (x, weight))
    assert torch.autograd.gradcheck(reference.add_rms_norm, (x, residual, weight))


@pytest.mark.cpu_only
def test_autocast_casts_the_weight_and_promotes_the_residual() -> None:
    x, residual, weight = testing.random(4, 64, dtype=torch.bfloat16), testing.random(4, 64), torch.ones(64)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = sail_ops.rms_norm(x, weight)
        normed, total = sail_ops.add_rms_norm(x, residual, weight)
    assert y.dtype == torch.bfloat16 and normed.dtype == total.dtype == torch.float32
    y.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_activation_checkpointing() -> None:
    x, residual, weight = inputs((9, 64), torch.float32)

    def checkpointed(*args: Tensor) -> tuple[Tensor, Tensor]:
        return torch.utils.checkpoint.checkpoint(sail_ops.add_rms_norm, *args, use_reentrant=False)

    plain = testing.run(sail_ops.add_rms_norm, x, residual, weight)
    testing.assert_same(testing.run(checkpointed, x, residual, weight), plain)


def test_backward_is_once_differentiable() -> None:
    x, _, weight = inputs((3, 64), torch.float32)
    (grad,) = torch.autograd.grad(sail_ops.rms_norm(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


X, W = torch.ones(2, 8), torch.ones(8)
ERRORS = {
    "scalar": (lambda: sail_ops.rms_norm(X[0, 0], W), r"rms_norm: x: got shape \[\]"),
    "weight_shape": (lambda: sail_ops.rms_norm(X, torch.ones(7)), r"weight_D: got shape \[7\], expected shape \[8\]"),
    "weight_dtype": (lambda: sail_ops.rms_norm(X, W.bfloat16()), "weight_D: got bfloat16, expected float32"),
    "x_dtype": (lambda: sail_ops.rms_norm(X.double(), W), "x: got .*, expected float32, bfloat16 or float16"),
    "x_strides": (lambda: sail_ops.rms_norm(torch.ones(8, 2).t(), W), "x: got stride 2, expected contiguous rows"),
    "weight_strides": (lambda: sail_ops.rms_norm(X, torch.ones(16)[::2]), "weight_D: got a non-contiguous"),
    "no_columns": (lambda: sail_ops.rms_norm(torch.ones(2, 0), torch.ones(0)), "x: got D = 0"),
    "nine_dims": (lambda: sail_ops.rms_norm(X.reshape(1, 1, 1, 1, 1, 1, 1, 2, 8), W), "expected 1 to 8 dimensions"),
    "residual_shape": (lambda: sail_ops.add_rms_norm(X, X[:1], W), r"add_rms_norm: residual: got shape \[1, 8\]"),
    "residual_dtype": (lambda: sail_ops.add_rms_norm(X, X.half(), W), "residual: got float16, expected float32"),
}


@pytest.mark.parametrize("call, message", ERRORS.values(), ids=ERRORS.keys())
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.cpu_only
def test_a_device_without_an_implementation_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"sail_ops::rms_norm.*CPU"):
        sail_ops.rms_norm(torch.ones(2, 8).to_mkldnn(), W)
