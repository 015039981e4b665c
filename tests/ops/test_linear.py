"""linear: our products on every instruction set, torch's where the rule says so; views, edges, tracing, errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sail_ops
from sail_ops import _library, reference, testing
from sail_ops.linear import own_linear

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
DTYPES = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
SHAPES = {  # rows, N outputs, K inputs
    "no_rows": ((0,), 32, 64),
    "no_outputs": ((5,), 0, 64),
    "no_inputs": ((5,), 32, 0),
    "one_row": ((1,), 300, 77),
    "one_number": ((1,), 1, 1),
    "odd": ((199,), 77, 33),
    "three_dims": ((3, 11), 128, 96),
    "a_vector": ((), 130, 64),
    "two_blocks": ((133,), 1100, 40),
    "long_sums": ((7,), 33, 1500),
    "many_rows": ((1100,), 70, 40),
}
pytestmark = pytest.mark.cpu_only  # elsewhere it is F.linear


def inputs(
    rows: tuple[int, ...], N: int, K: int, dtype: torch.dtype, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight = testing.random(*rows, K, dtype=dtype), testing.random(N, K, dtype=dtype, seed=1, scale=0.3)
    b = testing.random(N, dtype=dtype, seed=2).requires_grad_() if bias else None
    return x.requires_grad_(), weight.requires_grad_(), b


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("rows, N, K", SHAPES.values(), ids=SHAPES.keys())
@DTYPES
def test_accuracy(isa: str, dtype: torch.dtype, rows: tuple[int, ...], N: int, K: int, bias: bool) -> None:
    # a sum's rounding differs with its order: of the few elements of a small shape one may be over by chance
    testing.check_op(own_linear, reference.linear, *inputs(rows, N, K, dtype, bias), k=testing.CHANCE)


@DTYPES
def test_accuracy_of_a_model_s_shape(isa: str, dtype: torch.dtype) -> None:
    testing.check_op(own_linear, reference.linear, *inputs((256,), 384, 512, dtype))


@settings(max_examples=30, deadline=None)
@given(M=st.integers(0, 150), N=st.integers(0, 90), K=st.integers(0, 140))
def test_any_shape(M: int, N: int, K: int) -> None:
    testing.check_op(own_linear, reference.linear, *inputs((M,), N, K, torch.bfloat16), k=testing.CHANCE)


@DTYPES
def test_views_are_read_in_place_and_others_copied(isa: str, dtype: torch.dtype) -> None:
    wide, weights = testing.random(40, 3 * 48, dtype=dtype), testing.random(3 * 50, 48, dtype=dtype, seed=1)
    for x, weight in (
        (wide[:, 48:96], weights[50:100]),
        (wide[::2, :48], weights[::3]),
        (testing.random(48, 40, dtype=dtype).t(), testing.random(48, 50, dtype=dtype, seed=1).t()),
        (wide[:1, :48].expand(9, 48), weights),
        (wide.reshape(4, 10, 144)[:, 1:7, 40:88], weights),
    ):
        got, want = ([t.detach().requires_grad_() for t in pair] for pair in ((x, weight), (x.clone(), weight.clone())))
        testing.assert_same(testing.run(own_linear, *got, None), testing.run(own_linear, *want, None))
        assert own_linear(*got, None).is_contiguous()


@HALF
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_gradients_alone(dtype: torch.dtype, wanted: tuple[int, ...]) -> None:
    every = testing.run(own_linear, *inputs((37,), 70, 50, dtype))
    args = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs((37,), 70, 50, dtype)) if t is not None]
    for name, gradient in testing.run(own_linear, *args).gradients.items():
        assert gradient is not None and torch.equal(gradient, every.gradients[name])


@HALF
def test_the_rule(isa: str, dtype: torch.dtype) -> None:
    ours = dtype == torch.float16 or isa != "avx512_bf16"
    assert _library.torch_multiplies(dtype) != ours and _library.torch_multiplies(torch.float32)
    args = inputs((9,), 40, 24, dtype)
    want = testing.run(own_linear if ours else F.linear, *args)
    testing.assert_same(testing.run(sail_ops.linear, *args), want)
    assert sail_ops.supports("linear", "cpu", dtype).backend == ("cpu" if ours else "torch")
    assert sail_ops.supports("linear", "cuda", dtype).backend == "torch"
    assert (sail_ops.linear(*args).grad_fn.name() != F.linear(*args).grad_fn.name()) == ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "rows, N, taken", [((), 256, True), ((4, 4), 256, True), ((17,), 256, False), ((16,), 255, False)]
)
def test_few_rows_of_a_large_weight(dtype: torch.dtype, rows: tuple[int, ...], N: int, taken: bool) -> None:
    """Where torch is fast otherwise: the product is ours, its gradients are torch's."""
    if not _library.torch_multiplies(dtype):
        pytest.skip("torch's products are slow here")
    args = inputs(rows, N, 256, dtype)
    y, (ours, *_) = sail_ops.linear(*args), testing.run(own_linear, *args).outputs
    assert torch.equal(y, ours if taken else F.linear(*args))
    testing.check_op(sail_ops.linear, reference.linear, *args, k=testing.CHANCE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sail_ops.linear(*args).float().sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert ("sail_ops::linear" in names) == taken and "sail_ops::linear_backward" not in names


def test_exported_for_any_number_of_rows() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return sail_ops.linear(x, weight)

    x, weight, _ = (t.detach() for t in inputs((3,), 256, 256, torch.float32))
    program = torch.export.export(Layer(), (x, weight), dynamic_shapes=({0: torch.export.Dim("T")}, None)).module()
    for T in (2, 40):
        more = testing.random(T, 256)
        assert torch.equal(program(more, weight), F.linear(more, weight))


def test_other_dtypes_are_torch_s() -> None:
    args = [torch.ones(3, 4), torch.ones(2, 4), torch.ones(2)]
    for dtype in (torch.float32, torch.float64, torch.complex64, torch.int64):
        assert torch.equal(sail_ops.linear(*(t.to(dtype) for t in args)), torch.full((3, 2), 5).to(dtype))


@DTYPES
def test_same_bits_every_time_and_for_any_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    args = inputs((140,), 700, 90, dtype)
    testing.check_repeatable(own_linear, *args, times=5)
    # the sum of a bias's gradient is torch's
    first = testing.run(own_linear, *args[:2], None)
    before = torch.get_num_threads()
    try:
        for n in (1, 3, 8):
            torch.set_num_threads(n)
            testing.assert_same(testing.run(own_linear, *args[:2], None), first)
    finally:
        torch.set_num_threads(before)


@HALF
def test_non_finite_values_as_in_torch(isa: str, dtype: torch.dtype) -> None:
    x, weight, _ = (None if t is None else t.detach() for t in inputs((6,), 40, 33, dtype))
    x[1, 3], x[2, 5], weight[7, 8] = float("nan"), float("inf"), float("-inf")
    got, want = own_linear(x, weight, None), F.linear(x.float(), weight.float())
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


@HALF
def test_tracing(dtype: torch.dtype) -> None:
    testing.check_traceable(sail_ops.linear, *inputs((2, 5), 40, 24, dtype))
    testing.check_traceable(own_linear, *inputs((2, 5), 40, 24, dtype))


def test_opcheck() -> None:
    x, weight, bias = (t.detach() for t in inputs((5,), 8, 16, torch.bfloat16) if t is not None)
    torch.library.opcheck(torch.ops.sail_ops.linear.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.sail_ops.linear.default, (x, weight, None))
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(torch.ops.sail_ops.linear_backward.default, (x[:, :8].contiguous(), x, weight, *needs))


def test_autocast() -> None:
    x, weight, bias = inputs((5,), 8, 16, torch.float32)
    with torch.autocast("cpu", torch.float16):
        y = sail_ops.linear(x, weight, bias)
    assert y.dtype == torch.float16
    y.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@HALF
def test_forward_mode_and_second_derivatives_raise(dtype: torch.dtype) -> None:
    x, weight, _ = inputs((5,), 8, 16, dtype)
    with pytest.raises(NotImplementedError, match="sail_ops.linear: got an input with a tangent"):
        torch.func.jvp(lambda x: own_linear(x, weight, None), (x.detach(),), (torch.ones_like(x),))
    (dx,) = torch.autograd.grad(own_linear(x, weight, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_activation_checkpointing() -> None:
    args = inputs((9,), 40, 24, torch.float16)

    def checkpointed(*args: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(sail_ops.linear, *args, use_reentrant=False)

    testing.assert_same(testing.run(checkpointed, *args), testing.run(sail_ops.linear, *args))


X, W = torch.ones(2, 8, dtype=torch.float16), torch.ones(4, 8, dtype=torch.float16)
ERRORS = {
    "inputs": (lambda: sail_ops.linear(X, W[:, :7]), r"linear: weight: got shape \[4, 7\], expected \[N, K\] with x's"),
    "weight_dims": (lambda: sail_ops.linear(X, W[0]), r"linear: weight: got shape \[8\]"),
    "scalar": (lambda: sail_ops.linear(X[0, 0], W), r"x's last dimension as K, of \[\]"),
    "weight_dtype": (lambda: sail_ops.linear(X, W.float()), "linear: weight: got float32, expected float16"),
    "bias_shape": (lambda: sail_ops.linear(X, W, W[0]), r"linear: bias: got shape \[8\], expected shape \[4\]"),
    "bias_dtype": (lambda: sail_ops.linear(X, W, torch.ones(4)), "linear: bias: got float32, expected float16"),
}


@pytest.mark.parametrize("call, message", ERRORS.values(), ids=ERRORS.keys())
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
