"""layer_norm and add_layer_norm: accuracy of outputs and gradients, edges, tracing, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sail_ops
from sail_ops import reference, testing

DTYPES = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
SHAPES = pytest.mark.parametrize("shape", testing.NORM_SHAPES.values(), ids=testing.NORM_SHAPES.keys())


def inputs(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual, weight and bias."""
    x, residual = (testing.random(*shape, seed=i) + mean for i in range(2))
    weight, bias = 1 + testing.random(shape[-1], scale=0.2, seed=2), testing.random(shape[-1], seed=3)
    x, residual, weight, bias = (t.to(dtype).requires_grad_() for t in (x, residual, weight, bias))
    return x, residual, weight, bias


@SHAPES
@DTYPES
def test_accuracy(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual, weight, bias = inputs(shape, dtype)
    testing.check_op(sail_ops.layer_norm, reference.layer_norm, x, weight, bias)
    testing.check_op(sail_ops.add_layer_norm, reference.add_layer_norm, x, residual, weight, bias)


@DTYPES
def test_a_mean_far_from_zero(isa: str, dtype: torch.dtype) -> None:
    """Where sum(x^2) - sum(x)^2 would cancel; 77 columns, as the lanes past the end must not count as -mean."""
    x, residual, weight, bias = inputs((67, 77), dtype, mean=30)
    testing.check_op(sail_ops.layer_norm, reference.layer_norm, x, weight, bias)
    testing.check_op(sail_ops.add_layer_norm, reference.add_layer_norm, x, residual, weight, bias)


@pytest.mark.parametrize("step", [0.3, 3.0, 100.0, 3e4])
@DTYPES
def test_first_columns_unlike_the_rest(isa: str, dtype: torch.dtype, step: float) -> None:
    """Where the mean of a row's first columns, which the CPU's kernel starts from, is a bad guess."""
    x, residual, weight, bias = (t.detach() for t in inputs((9, 1500), dtype))
    x[::2, :256] += step
    x[1::2, 0] = step
    x.requires_grad_()
    testing.check_op(sail_ops.layer_norm, reference.layer_norm, x, weight, bias)
    testing.check_op(sail_ops.add_layer_norm, reference.add_layer_norm, x, residual, weight, bias)


@DTYPES
def test_without_bias_and_with_another_eps(isa: str, dtype: torch.dtype) -> None:
    x, residual, weight, _ = inputs((33, 256), dtype)
    x = (x.detach() * 1e-2).requires_grad_()
    for eps in (1e-6, 1e-3):
        testing.check_op(sail_ops.layer_norm, reference.layer_norm, x, weight, None, eps)
    testing.check_op(sail_ops.add_layer_norm, reference.add_layer_norm, x, residual, weight)


def test_is_torchs_layer_norm() -> None:
    x, _, weight, bias = (t.detach() for t in inputs((9, 100), torch.float32))
    torch.testing.assert_close(sail_ops.layer_norm(x, weight, bias), F.layer_norm(x, (100,), weight, bias))
    torch.testing.assert_close(reference.layer_norm(x, weight, bias), F.layer_norm(x, (100,), weight, bias))


@pytest.mark.parametrize("which", [(1, 0, 0, 0), (0, 1, 0, 1), (0, 0, 1, 0), (0, 0, 0, 1), (1, 1, 0, 0)])
def test_only_wanted_gradients(which: tuple[int, ...]) -> None:
    args = [t.requires_grad_(bool(w)) for t, w in zip(inputs((9, 64), torch.float32), which, strict=True)]
    testing.check_op(sail_ops.add_layer_norm, reference.add_layer_norm, *args)
    if any((which[0], *which[2:])):
        testing.check_op(sail_ops.layer_norm, reference.layer_norm, args[0], *args[2:])


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_outputs_used(used: int) -> None:
    ours, theirs = (lambda *args, f=f: f(*args)[used] for f in (sail_ops.add_layer_norm, reference.add_layer_norm))
    testing.check_op(ours, theirs, *inputs((9, 64), torch.float32), k=testing.CHANCE)  # rows of 64 numbers


def test_views_are_read_in_place(isa: str) -> None:
    wide = testing.random(8, 5, 154).transpose(0, 1)[..., :77]
    _, _, weight, bias = (t.detach() for t in inputs((1, 77), torch.float32))
    got = sail_ops.layer_norm(wide, weight, bias)
    assert torch.equal(got, sail_ops.layer_norm(wide.contiguous(), weight, bias)) and got.is_contiguous()


def test_same_bits_every_time_and_for_any_number_of_threads(isa: str) -> None:
    args = inputs((333, 200), torch.bfloat16)
    testing.check_repeatable(sail_ops.add_layer_norm, *args)
    first = testing.run(sail_ops.add_layer_norm, *args)
    before = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            testing.assert_same(testing.run(sail_ops.add_layer_norm, *args), first)
    finally:
        torch.set_num_threads(before)


@DTYPES
def test_results_larger_than_the_caches(dtype: torch.dtype) -> None:
    """Are stored past them, which no smaller case does."""
    _, _, weight, bias = (t.detach() for t in inputs((1, 4096), dtype))
    x = testing.random(64, 4096, dtype=dtype)
    grad = testing.random(64, 4096, dtype=dtype, seed=1)
    ops, many = torch.ops.sail_ops, 32 if dtype == torch.float32 else 64
    for op, *rest in ((ops.layer_norm_backward, True), (ops.rms_norm_backward,)):
        small = op(grad, None, x, weight, 1e-5, True, False, *rest)[0]
        large = op(grad.repeat(many, 1), None, x.repeat(many, 1), weight, 1e-5, True, False, *rest)[0]
        assert torch.equal(large, small.repeat(many, 1))
    small = sail_ops.swiglu(x, grad)
    assert torch.equal(sail_ops.swiglu(x.repeat(many, 1), grad.repeat(many, 1)), small.repeat(many, 1))


def test_tracing() -> None:
    x, residual, weight, bias = inputs((5, 64), torch.bfloat16)
    testing.check_traceable(sail_ops.layer_norm, x, weight, bias)
    testing.check_traceable(sail_ops.add_layer_norm, x, residual, weight)


def test_opcheck() -> None:
    x, residual, weight, bias = (t.detach() for t in inputs((5, 64), torch.float32))
    ops = torch.ops.sail_ops
    torch.library.opcheck(ops.layer_norm.default, (x, weight, bias, 1e-5))
    torch.library.opcheck(ops.add_layer_norm.default, (x, residual, weight, None, 1e-5))
    for grad_sum in (None, residual):
        for needs in ((True, True, True), (True, False, False), (False, False, True)):
            torch.library.opcheck(ops.layer_norm_backward.default, (x, grad_sum, residual, weight, 1e-5, *needs))


def test_autocast_casts_weight_and_bias() -> None:
    x, residual = testing.random(4, 64, dtype=torch.bfloat16), testing.random(4, 64)
    weight, bias = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
    with torch.autocast(x.device.type, torch.bfloat16):
        y = sail_ops.layer_norm(x, weight, bias)
        normed, total = sail_ops.add_layer_norm(x, residual, weight, bias)
    assert y.dtype == torch.bfloat16 and normed.dtype == total.dtype == torch.float32
    y.sum().backward()
    assert weight.grad is not None and bias.grad is not None and bias.grad.dtype == torch.float32


X, W = torch.ones(2, 8), torch.ones(8)
ERRORS = {
    "scalar": (lambda: sail_ops.layer_norm(X[0, 0], W), r"layer_norm: x: got shape \[\]"),
    "weight_shape": (lambda: sail_ops.layer_norm(X, W[:7]), r"weight_D: got shape \[7\], expected shape \[8\]"),
    "bias_shape": (lambda: sail_ops.layer_norm(X, W, W[:7]), r"bias_D: got shape \[7\], expected shape \[8\]"),
    "bias_dtype": (lambda: sail_ops.layer_norm(X, W, W.half()), "bias_D: got float16, expected float32"),
    "x_strides": (lambda: sail_ops.layer_norm(torch.ones(8, 2).t(), W), "x: got stride 2, expected contiguous rows"),
    "no_columns": (lambda: sail_ops.layer_norm(X[:, :0], W[:0]), "x: got D = 0"),
    "nine_dims": (lambda: sail_ops.layer_norm(X.reshape(1, 1, 1, 1, 1, 1, 1, 2, 8), W), "expected 1 to 8 dimensions"),
    "residual": (lambda: sail_ops.add_layer_norm(X, X[:1], W), r"add_layer_norm: residual: got shape \[1, 8\]"),
}


@pytest.mark.parametrize("call, message", ERRORS.values(), ids=ERRORS.keys())
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
