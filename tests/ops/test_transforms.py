"""Every operator under torch's function transforms: right, or an error that says what to do; never zeros in silence."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import sail_ops
from sail_ops.testing import random

W, IDS = random(8, seed=1), torch.tensor([[0, 1], [1, 0], [0, 1]])
GATE_UP, DOWN = random(2, 12, 8, seed=2), random(2, 8, 6, seed=3)
ENDS, TABLE = torch.tensor([2, 3], dtype=torch.int32), random(3, 1, 8, seed=4)
CU, HEAD = torch.tensor([0, 2, 3], dtype=torch.int32), random(5, 8)


class Operator(NamedTuple):
    """A function of one tensor, and a shape for it."""

    function: Callable[[Tensor], Tensor]
    shape: tuple[int, ...] = (3, 8)


def experts(x: Tensor) -> Tensor:
    return sail_ops.fused_experts(x, GATE_UP, DOWN, IDS, torch.full((3, 2), 0.5))


HEADS = (1, 3, 2, 8)
OPERATORS = {
    "rms_norm": Operator(lambda x: sail_ops.rms_norm(x, W)),
    "add_rms_norm": Operator(lambda x: sail_ops.add_rms_norm(x, x, W)[0]),
    "layer_norm": Operator(lambda x: sail_ops.layer_norm(x, W)),
    "add_layer_norm": Operator(lambda x: sail_ops.add_layer_norm(x, x, W)[0]),
    "swiglu": Operator(lambda x: sail_ops.swiglu(x, x)),
    "route_topk": Operator(lambda x: sail_ops.route_topk(x, 2, renormalize=True).weights_TK),
    "fused_experts": Operator(experts),
    "grouped_experts": Operator(lambda x: sail_ops.grouped_experts(x, GATE_UP, DOWN, ENDS)),
    "grouped_mm": Operator(lambda x: sail_ops.grouped_mm(x, DOWN, ENDS)),
    "rope": Operator(lambda q: sail_ops.rope(q, q, TABLE[:, 0], TABLE[:, 0])[0], HEADS),
    "qk_norm_rope": Operator(lambda q: sail_ops.qk_norm_rope(q, q, W, W, TABLE[:, 0], TABLE[:, 0])[0], HEADS),
    "attention": Operator(lambda q: sail_ops.attention(q, q, q, causal=True), HEADS),
    "attention_varlen": Operator(lambda q: sail_ops.attention_varlen(q, q, q, CU, CU, 2, 2, causal=True), (3, 2, 8)),
    "linear_cross_entropy": Operator(lambda x: sail_ops.linear_cross_entropy(x, HEAD, torch.arange(3))),
}
EVERY = pytest.mark.parametrize("name", OPERATORS)


def test_every_public_operator_is_here() -> None:
    # no operators, plain PyTorch, and what is PyTorch's in fp32 (test_linear.py has its other dtypes)
    others = {"Routing", "empty_cache", "supports", "load_balancing_loss", "linear"}
    assert {name for name in sail_ops.__all__ if name not in others} == set(OPERATORS)


@EVERY
@pytest.mark.parametrize("mode", ["jvp", "jacfwd", "dual_level"])
def test_forward_mode_raises(name: str, mode: str) -> None:
    function, shape = OPERATORS[name]
    x, tangent = random(*shape), torch.ones(shape)
    with pytest.raises(NotImplementedError, match=f"sail_ops.{name}: got an input with a tangent"):
        if mode == "jvp":
            torch.func.jvp(function, (x,), (tangent,))
        elif mode == "jacfwd":
            torch.func.jacfwd(function)(x)
        else:
            with forward_ad.dual_level():
                function(forward_ad.make_dual(x.requires_grad_(), tangent))


def test_a_tangent_of_a_constant_raises_too() -> None:
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="sail_ops.rope: got an input with a tangent"),
    ):
        cos = forward_ad.make_dual(TABLE[:, 0], torch.ones(3, 8))
        sail_ops.rope(random(*HEADS), random(*HEADS), cos, TABLE[:, 0])


@EVERY
def test_inputs_without_a_tangent_compute_inside_forward_mode(name: str) -> None:
    function, shape = OPERATORS[name]
    with forward_ad.dual_level():
        inside = function(random(*shape))
    assert torch.equal(inside, function(random(*shape)))


@EVERY
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian, torch.func.jacrev])
def test_transforms_of_reverse_mode_raise(name: str, transform: Callable) -> None:
    function, shape = OPERATORS[name]
    with pytest.raises((RuntimeError, NotImplementedError), match="autograd.Function|tangent"):
        transform(lambda x: function(x).sum())(random(*shape))


@EVERY
def test_a_second_derivative_raises(name: str) -> None:
    function, shape = OPERATORS[name]
    x = random(*shape).requires_grad_()
    (dx,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@EVERY
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop(name: str) -> None:
    function, shape = OPERATORS[name]
    x = random(2, *shape)
    assert torch.equal(torch.func.vmap(function)(x), torch.stack([function(row) for row in x]))


def test_functional_call_has_gradients() -> None:
    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return sail_ops.rms_norm(x, self.weight)

    weight = W.clone().requires_grad_()
    torch.func.functional_call(Norm(), {"weight": weight}, (random(3, 8),)).sum().backward()
    assert weight.grad is not None and weight.grad.any()
