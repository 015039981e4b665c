"""Run in a process of its own on a library with changed kernels (test_mutation.py): prints which checks fail, as JSON.

python mutation_checks.py avx2:rms_norm generic:swiglu ...
"""

import json
import sys

import torch

import sail_ops
from sail_ops import reference, testing
from sail_ops.linear import own_linear


def rms_norm(dtype: torch.dtype) -> None:
    x = testing.random(37, 101, dtype=dtype, scale=1e-2).requires_grad_()
    weight = testing.random(101, dtype=dtype, seed=2).requires_grad_()
    testing.check_op(sail_ops.rms_norm, reference.rms_norm, x, weight, 1e-5)


def add_rms_norm(dtype: torch.dtype) -> None:
    x, residual = (testing.random(37, 101, dtype=dtype, seed=s).requires_grad_() for s in (0, 1))
    weight = testing.random(101, dtype=dtype, seed=2).requires_grad_()
    testing.check_op(sail_ops.add_rms_norm, reference.add_rms_norm, x, residual, weight)


def layer_norm(dtype: torch.dtype) -> None:
    x = (testing.random(37, 101) + 300).to(dtype).requires_grad_()
    weight, bias = (testing.random(101, dtype=dtype, seed=s).requires_grad_() for s in (2, 3))
    testing.check_op(sail_ops.layer_norm, reference.layer_norm, x, weight, bias)
    apart, ones = testing.random(5, 20_000), torch.ones(20_000, dtype=dtype)
    apart[:, :256] += 1000
    testing.check_op(sail_ops.layer_norm, reference.layer_norm, apart.to(dtype).requires_grad_(), ones, None)


def heads(dtype: torch.dtype, A: int = 70) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """q and k, cos and sin."""
    q, k = (testing.random(37, h, A, dtype=dtype, seed=h).requires_grad_() for h in (3, 2))
    angles = testing.random(37, A // 2, seed=5).repeat(1, 2)
    return (q, k), (angles.cos(), angles.sin())


def rope(dtype: torch.dtype) -> None:
    q_k, tables = heads(dtype)
    testing.check_op(sail_ops.rope, reference.rope, *q_k, *tables)


def rope_positions(dtype: torch.dtype) -> None:
    q_k, tables = heads(dtype)
    testing.check_op(sail_ops.rope, reference.rope, *q_k, *tables, torch.arange(37).flip(0))


def qk_norm_rope(dtype: torch.dtype) -> None:
    for A in (70, 128):
        q_k, tables = heads(dtype, A)
        weights = (testing.random(A, dtype=dtype, seed=s).requires_grad_() for s in (2, 3))
        pool = {"args[0]": 3, "args[1]": 2}
        testing.check_op(sail_ops.qk_norm_rope, reference.qk_norm_rope, *q_k, *weights, *tables, pool=pool)


def linear_cross_entropy(dtype: torch.dtype, T: int = 37, V: int = 1100, z_loss: float = 0.0) -> None:
    hidden = testing.random(T, 64, dtype=dtype).requires_grad_()
    lm_head = testing.random(V, 64, dtype=dtype, scale=0.25, seed=1).requires_grad_()
    labels = torch.arange(T) * 7 % V
    ops = sail_ops.linear_cross_entropy, reference.linear_cross_entropy
    testing.check_op(*ops, hidden, lm_head, labels, z_loss=z_loss, pool={"args[0]": 16, "args[1]": 64})


def linear_cross_entropy_chunks(dtype: torch.dtype) -> None:
    linear_cross_entropy(dtype, T=200, V=128)


def z_loss(dtype: torch.dtype) -> None:
    linear_cross_entropy(dtype, z_loss=0.1)


def linear(dtype: torch.dtype) -> None:
    x, bias = (testing.random(*shape, dtype=dtype).requires_grad_() for shape in ((37, 64), (70,)))
    weight = testing.random(70, 80, dtype=dtype, scale=0.25, seed=1)[:, :64].detach().requires_grad_()
    testing.check_op(own_linear, reference.linear, x, weight, bias)


def swiglu(dtype: torch.dtype) -> None:
    gate, up = (testing.random(37, 101, dtype=dtype, seed=s).requires_grad_() for s in (0, 1))
    testing.check_op(sail_ops.swiglu, reference.swiglu, gate, up)


def route_topk(dtype: torch.dtype) -> None:
    logits = (testing.random(150, 40) * 4).round().div(4).to(dtype).requires_grad_()  # many ties
    for renormalize in (False, True):
        testing.check_op(sail_ops.route_topk, reference.route_topk, logits, 6, renormalize=renormalize)


def route_nan(dtype: torch.dtype) -> None:
    logits = torch.full((3, 40), float("nan"), dtype=dtype)
    assert torch.equal(sail_ops.route_topk(logits, 6, renormalize=True).ids_TK, torch.arange(6).expand(3, 6))


def fused_experts(dtype: torch.dtype) -> None:
    case = testing.EXPERTS_CASES["odd"]
    x = testing.random(case.T, case.D, dtype=dtype).requires_grad_()
    gate_up = testing.random(case.E, 2 * case.F, case.D, dtype=dtype, scale=case.D**-0.5, seed=1).requires_grad_()
    down = testing.random(case.E, case.D, case.F, dtype=dtype, scale=case.F**-0.5, seed=2).requires_grad_()
    weights = testing.random(case.T, case.K, seed=3).sigmoid().requires_grad_()
    args = x, gate_up, down, testing.random_ids(case), weights
    pool = {"args[1]": 64, "args[2]": 64}
    testing.check_op(sail_ops.fused_experts, reference.fused_experts, *args, pool=pool)


def attention(dtype: torch.dtype) -> None:
    pool = {"outputs[0]": 64, "args[0]": 256, "args[1]": 1024, "args[2]": 1024}
    for S, L in ((140, 150), (7, 600)):
        shapes = (1, S, 16, 72), (1, L, 2, 72), (1, L, 2, 72)  # more blocks of rows than parts
        q, k, v = (testing.random(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(shapes))
        k = (k * torch.linspace(0.5, 1.5, L).to(dtype)[:, None, None]).detach().requires_grad_()  # maxima that rise
        kwargs = {"causal": True, "return_lse": True}
        testing.check_op(sail_ops.attention, reference.attention, q, k, v, pool=pool, **kwargs)


def run(isa: str, check: str) -> str:
    """The first failure, or nothing."""
    with testing.use_isa(isa):
        for dtype in testing.DTYPES:
            try:
                globals()[check](dtype)
            except AssertionError as e:
                return f"{dtype}: {e or 'assertion'}"
    return ""


if __name__ == "__main__":
    print(json.dumps({pair: run(*pair.split(":")) for pair in sys.argv[1:]}))
