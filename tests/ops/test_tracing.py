"""Several operators in one graph: dynamic shapes, autocast, and the default compiler backend."""

import pytest
import torch
from torch import Tensor

import sail_ops
from sail_ops import testing


def layer(x: Tensor, weight: Tensor) -> Tensor:
    normed, total = sail_ops.add_rms_norm(sail_ops.rms_norm(x, weight), x, weight)
    routing = sail_ops.route_topk(normed[:, :16], 4, renormalize=True)
    loss = sail_ops.load_balancing_loss(routing.counts_E, routing.prob_sum_E, x.shape[0])
    return sail_ops.swiglu(*total.chunk(2, -1)).sum() + routing.weights_TK.square().sum() + loss


def under_autocast(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x, weight)


def inputs(T: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return testing.random(T, 64, dtype=dtype).requires_grad_(), torch.ones(64, requires_grad=True)


def test_dynamic_shapes() -> None:
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 9, 33):
        testing.assert_same(testing.run(compiled, *inputs(T)), testing.run(layer, *inputs(T)))


def test_autocast() -> None:
    compiled = torch.compile(under_autocast, fullgraph=True, backend="aot_eager")
    args = inputs(5, torch.bfloat16)
    testing.assert_same(testing.run(compiled, *args), testing.run(under_autocast, *args))


@pytest.mark.slow
def test_default_backend() -> None:
    got, want = (testing.run(f, *inputs(5)) for f in (torch.compile(layer, fullgraph=True), layer))
    for name, grad in want.gradients.items():
        torch.testing.assert_close(got.gradients[name], grad)
