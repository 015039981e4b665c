"""grouped_experts and grouped_mm, on rows already sorted by expert: accuracy, layouts, tail rows, peers."""

import pytest
import torch
import torch.nn.functional as F
from expert_layer import POOL, Layer, biases, layer, leaf, offsets
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import judged_operator
from torch import Tensor

import sail_ops
from sail_ops import reference, testing
from sail_ops.testing import ExpertsCase

DTYPES = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
WEIGHTED = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
CASE = ExpertsCase(200, 77, 65, 5, 1)
POOLED = dict.fromkeys(("args[1]", "args[2]"), POOL)
ENDS = {
    "full": offsets(40, 1, 129, 20, 10),
    "tail": offsets(3, 0, 130, 0, 12),
    "first_and_last_empty": offsets(0, 60, 60, 70, 0),
    "all_tail": offsets(0, 0, 0, 0, 0),
    "one_expert": offsets(0, 0, 200, 0, 0),
}
GROUPS = pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())


@GROUPS
@WEIGHTED
@DTYPES
def test_experts_accuracy(isa: str, dtype: torch.dtype, weighted: bool, ends: Tensor) -> None:
    x, gate_up, down, _, weights = layer(CASE, dtype)
    args = (x, gate_up, down, ends, weights[:, 0].detach().requires_grad_() if weighted else None)
    testing.check_op(
        sail_ops.grouped_experts, reference.grouped_experts, *args, pool=POOLED, biases=biases(CASE, dtype), clamp=2.0
    )


@WEIGHTED
@DTYPES
def test_tail_rows_of_experts_are_zero_and_not_read(isa: str, dtype: torch.dtype, weighted: bool) -> None:
    ends = ENDS["tail"]
    end = int(ends[-1])
    x, gate_up, down, _, weights = layer(CASE, dtype)
    y, h = experts(x.detach(), gate_up.detach(), down.detach(), ends, weights[:, 0].detach() if weighted else None)
    assert not y[end:].any() and y[:end].any()
    poisoned = [t.detach().clone() for t in (x, weights[:, 0], y, h)]
    for t in poisoned:
        t[end:] = torch.nan
    px, pweights, dy, ph = poisoned
    grads = torch.ops.sail_ops.grouped_experts_backward(
        dy, px, gate_up.detach(), None, down.detach(), ends, pweights if weighted else None, ph, None, None, 0, None,
        63 - 48, None, None, None,
    )  # fmt: skip
    for g in grads:
        assert g.isfinite().all()
    assert not grads[0][end:].any() and grads[0][:end].any()
    assert not weighted or not grads[4][end:].any()
    assert torch.equal(experts(px, gate_up.detach(), down.detach(), ends, pweights if weighted else None)[0], y)


def experts(x: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    return judged_operator("grouped_experts")(x, gate_up, None, down, ends, weights, None, None, 0, None, True)


@DTYPES
def test_experts_agree_with_fused_experts(isa: str, dtype: torch.dtype) -> None:
    args = layer(ExpertsCase(67, 48, 40, 5, 1), dtype)
    order = args.ids[:, 0].argsort(stable=True)
    ends = offsets(*torch.bincount(args.ids[:, 0], minlength=5).tolist())
    fused = testing.run(sail_ops.fused_experts, *args)
    rows = Layer(leaf(args.x[order], dtype), args.gate_up, args.down, ends, leaf(args.weights[order, 0], torch.float32))
    upstream = [fused.upstream[0][order]]
    grouped = testing.run(sail_ops.grouped_experts, *rows, upstream=upstream)
    for name in ("args[1]", "args[2]"):
        assert torch.equal(grouped.gradients[name], fused.gradients[name])
    assert torch.equal(grouped.gradients["args[0]"], fused.gradients["args[0]"][order])
    assert torch.equal(grouped.gradients["args[4]"], fused.gradients["args[4]"][order, 0])
    # fused_experts rounds an expert's output before it is weighted
    want = reference.grouped_experts(*(t.detach() for t in rows))
    wide = reference.grouped_experts(*(t.detach().double() if t.is_floating_point() else t for t in rows))
    for y in (grouped.outputs[0], fused.outputs[0][order]):
        testing.assert_accurate(y, wide, want)


def test_experts_repeat_to_the_bit(isa: str) -> None:
    x, gate_up, down, _, weights = layer(CASE, torch.bfloat16)
    args = (x, gate_up, down, ENDS["tail"], weights[:, 0].detach().requires_grad_())
    testing.check_repeatable(sail_ops.grouped_experts, *args)


# ---- grouped_mm


def matrices(
    dtype: torch.dtype, k: int = 77, n: int = 65, R: int = 200, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """x [R, k] and w [5, k, n], as the transposed view of an [5, n, k] parameter if so wanted; both leaves."""
    x = leaf(testing.random(R, k), dtype)
    w = testing.random(5, k, n, scale=k**-0.5, seed=1).to(dtype)
    return x, (w.transpose(1, 2).contiguous().transpose(1, 2) if transposed else w).requires_grad_()


TRANSPOSED = pytest.mark.parametrize("transposed", [False, True], ids=["along_n", "along_k"])


@GROUPS
@TRANSPOSED
@DTYPES
def test_mm_accuracy(isa: str, dtype: torch.dtype, transposed: bool, ends: Tensor) -> None:
    x, w = matrices(dtype, transposed=transposed)
    testing.check_op(sail_ops.grouped_mm, reference.grouped_mm, x, w, ends, pool=POOLED)


@TRANSPOSED
def test_mm_gradient_is_laid_out_like_the_weight(transposed: bool) -> None:
    x, w = matrices(torch.float32, transposed=transposed)
    _, dw = torch.autograd.grad(sail_ops.grouped_mm(x, w, ENDS["tail"]).sum(), (x, w))
    assert dw.stride() == w.stride()
    parameter = w.detach().transpose(1, 2).contiguous().requires_grad_()
    sail_ops.grouped_mm(x, parameter.transpose(1, 2), ENDS["tail"]).sum().backward()
    assert parameter.grad.is_contiguous()


@pytest.mark.parametrize("wanted", [0, 1])
def test_mm_only_wanted_gradients(wanted: int) -> None:
    args = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(matrices(torch.float32))]
    both = testing.run(sail_ops.grouped_mm, *matrices(torch.float32), ENDS["tail"]).gradients
    one = testing.run(sail_ops.grouped_mm, *args, ENDS["tail"]).gradients
    assert list(one) == [f"args[{wanted}]"] and torch.equal(one[f"args[{wanted}]"], both[f"args[{wanted}]"])
    x, w = (t.detach() for t in args)
    dy = sail_ops.grouped_mm(x, w, ENDS["tail"])
    results = torch.ops.sail_ops.grouped_mm_backward(dy, x, w, ENDS["tail"], wanted == 0, wanted == 1)
    assert results[wanted].numel() and not results[1 - wanted].numel()


@TRANSPOSED
@DTYPES
def test_mm_views_are_read_in_place(isa: str, dtype: torch.dtype, transposed: bool) -> None:
    x, w = (t.detach() for t in matrices(dtype, k=90, n=80, transposed=transposed))
    ends = ENDS["full"]
    x, w = x[:, 5:70], w[:, 5:70, 3:72]
    assert torch.equal(sail_ops.grouped_mm(x, w, ends), sail_ops.grouped_mm(x.contiguous(), w.clone(), ends))
    shared = w[:1].expand(5, -1, -1)
    assert torch.equal(sail_ops.grouped_mm(x, shared, ends), sail_ops.grouped_mm(x, shared.clone(), ends))
    testing.check_op(
        sail_ops.grouped_mm, reference.grouped_mm, x.requires_grad_(), w.requires_grad_(), ends, pool=POOLED
    )


@pytest.mark.parametrize("k, n", [(1, 65), (65, 1), (3, 2100), (2100, 3)])
@TRANSPOSED
def test_mm_narrow_and_wide(isa: str, k: int, n: int, transposed: bool) -> None:
    x, w = matrices(torch.bfloat16, k, n, transposed=transposed)  # one rounding outweighs the sum's
    testing.check_op(sail_ops.grouped_mm, reference.grouped_mm, x, w, ENDS["tail"], pool=POOLED)


@TRANSPOSED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mm_means_what_torch_means(dtype: torch.dtype, transposed: bool) -> None:
    x, w = matrices(dtype, k=64, n=32, transposed=transposed)
    testing.check_op(sail_ops.grouped_mm, reference.grouped_mm, x, w, ENDS["full"], base=torch_grouped_mm, pool=POOLED)


def torch_grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, w, offs=ends)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    groups=st.lists(st.integers(0, 40), min_size=5, max_size=5),
    tail=st.integers(0, 9),
    k=st.integers(4, 150),
    n=st.integers(4, 150),
    transposed=st.booleans(),
)
def test_mm_any_shape(groups: list[int], tail: int, k: int, n: int, transposed: bool) -> None:
    x, w = matrices(torch.float32, k, n, sum(groups) + tail, transposed)
    testing.check_op(sail_ops.grouped_mm, reference.grouped_mm, x, w, offsets(*groups), pool=POOLED, k=testing.CHANCE)


def test_mm_repeats_to_the_bit(isa: str) -> None:
    testing.check_repeatable(sail_ops.grouped_mm, *matrices(torch.bfloat16), ENDS["tail"])


@pytest.mark.cpu_only
def test_mm_under_autocast() -> None:
    x, w = matrices(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = testing.run(sail_ops.grouped_mm, x, w, ENDS["full"])
    want = sail_ops.grouped_mm(x.detach().bfloat16(), w.detach().bfloat16(), ENDS["full"])
    assert torch.equal(got.outputs[0], want)
    assert all(g.dtype == torch.float32 and g.any() for g in got.gradients.values())


def test_mm_backward_is_once_differentiable() -> None:
    x, w = matrices(torch.float32)
    (grad,) = torch.autograd.grad(sail_ops.grouped_mm(x, w, ENDS["full"]).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
