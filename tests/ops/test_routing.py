"""route_topk and load_balancing_loss: accuracy, ties, replay, masks, NaN, ranks, tracing, errors."""

import math
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sail_ops
from sail_ops import reference, testing

DTYPES = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
RENORMALIZE = pytest.mark.parametrize("renormalize", [False, True])
CASES = {  # T, E, K
    "no_token": (0, 8, 2),
    "one_token": (1, 8, 2),
    "one_expert": (70, 1, 1),
    "all_experts": (70, 5, 5),
    "odd": (199, 77, 3),
    "qwen3": (199, 128, 8),
    "many": (70, 513, 6),
}


def logits(T: int, E: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return testing.random(T, E, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@RENORMALIZE
@DTYPES
def test_accuracy(isa: str, dtype: torch.dtype, case: tuple[int, int, int], renormalize: bool) -> None:
    T, E, K = case
    x, bias_E = logits(T, E, dtype), testing.random(E, scale=0.01, seed=1)
    testing.check_op(sail_ops.route_topk, reference.route_topk, x, K, renormalize=renormalize)
    mask_T = torch.arange(T) % 3 > 0
    kwargs = {"renormalize": renormalize, "bias_E": bias_E, "mask_T": mask_T}
    testing.check_op(sail_ops.route_topk, reference.route_topk, x, K, **kwargs)


@RENORMALIZE
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_replay(isa: str, dtype: torch.dtype, renormalize: bool) -> None:
    x = logits(67, 33)
    ids_TK = torch.randint(33, (67, 4), generator=torch.Generator().manual_seed(0), dtype=dtype)  # repeats included
    testing.check_op(sail_ops.route_topk, reference.route_topk, x, 4, renormalize=renormalize, ids_TK=ids_TK)
    chosen = sail_ops.route_topk(x, 4, renormalize=renormalize)
    again = sail_ops.route_topk(x, 4, renormalize=renormalize, ids_TK=chosen.ids_TK)
    assert all(torch.equal(a, b) for a, b in zip(chosen, again, strict=True))
    assert again.ids_TK.data_ptr() != chosen.ids_TK.data_ptr()


@settings(max_examples=40, deadline=None)
@given(T=st.integers(0, 150), E=st.integers(1, 70), data=st.data())
def test_any_shape(T: int, E: int, data: st.DataObject) -> None:
    K = data.draw(st.integers(1, E))
    x = testing.random(T, 96, seed=E)[:, :E].requires_grad_()  # rows with a stride
    renormalize = data.draw(st.booleans())
    testing.check_op(sail_ops.route_topk, reference.route_topk, x, K, renormalize=renormalize, k=testing.CHANCE)


@DTYPES
def test_ties_go_to_the_lower_id(isa: str, dtype: torch.dtype) -> None:
    x = torch.randint(0, 3, (300, 40), generator=torch.Generator().manual_seed(0)).to(dtype)
    got, want = (f(x, 9, renormalize=True) for f in (sail_ops.route_topk, reference.route_topk))
    assert torch.equal(got.ids_TK, want.ids_TK)
    assert torch.equal(sail_ops.route_topk(torch.zeros(3, 40), 5, renormalize=True).ids_TK[1], torch.arange(5))


def test_bias_of_minus_infinity_bars_an_expert(isa: str) -> None:
    x, bias_E = testing.random(50, 20), torch.zeros(20)
    bias_E[:10] = -math.inf
    assert sail_ops.route_topk(x, 10, renormalize=True, bias_E=bias_E).ids_TK.min() == 10
    got = sail_ops.route_topk(x, 15, renormalize=True, bias_E=bias_E).ids_TK
    assert torch.equal(got[:, 10:], torch.arange(5).expand(50, 5))  # barred ones last, in order


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("everywhere", [False, True])
def test_non_finite_logits(isa: str, bad: float, everywhere: bool) -> None:
    x = testing.random(5, 33)
    x[3, slice(None) if everywhere else 20] = bad
    got, want = (f(x, 4, renormalize=True) for f in (sail_ops.route_topk, reference.route_topk))
    assert torch.equal(got.ids_TK, want.ids_TK) and torch.equal(got.counts_E, want.counts_E)
    assert torch.equal(got.weights_TK.isnan(), want.weights_TK.isnan())
    bias_E = torch.full((33,), math.nan)
    ids_TK = sail_ops.route_topk(testing.random(5, 33), 33, renormalize=True, bias_E=bias_E).ids_TK
    assert torch.equal(ids_TK, torch.arange(33).expand(5, 33))


@pytest.mark.parametrize("output", [0, 3])
def test_one_of_two_outputs_used(isa: str, output: int) -> None:
    """The same gradient is sent into both: one made from each one's own output would be off by that output's error."""
    ours, theirs = (
        lambda x, f=f: f(x, 4, renormalize=True)[output] for f in (sail_ops.route_topk, reference.route_topk)
    )
    testing.check_op(ours, theirs, logits(67, 33))


def test_same_bits_every_time_and_for_any_number_of_threads(isa: str) -> None:
    x = logits(700, 60, torch.bfloat16)
    testing.check_repeatable(sail_ops.route_topk, x, 4, renormalize=True)
    first = testing.run(sail_ops.route_topk, x, 4, renormalize=True)
    before = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            testing.assert_same(testing.run(sail_ops.route_topk, x, 4, renormalize=True), first)
    finally:
        torch.set_num_threads(before)


def test_tracing() -> None:
    testing.check_traceable(sail_ops.route_topk, logits(9, 20), 4, renormalize=True)


def test_opcheck() -> None:
    x, ops = logits(9, 20).detach(), torch.ops.sail_ops
    ids_TK, mask_T = torch.zeros(9, 4, dtype=torch.int32), torch.ones(9, dtype=torch.bool)
    torch.library.opcheck(ops.route_topk.default, (x, 4, True, None, None, None))
    torch.library.opcheck(ops.route_topk.default, (x, 4, False, torch.ones(20), ids_TK, mask_T))
    grad_TK, grad_E = torch.ones(9, 4), torch.ones(20)
    torch.library.opcheck(ops.route_topk_backward.default, (grad_TK, None, x, ids_TK, None, True))
    torch.library.opcheck(ops.route_topk_backward.default, (None, grad_E, x, ids_TK.long(), mask_T, False))


@RENORMALIZE
def test_reference_gradients(renormalize: bool) -> None:
    x = logits(3, 7).detach().double().requires_grad_()

    def floats(x: Tensor) -> tuple[Tensor, Tensor]:
        routing = reference.route_topk(x, 3, renormalize=renormalize)
        return routing.weights_TK, routing.prob_sum_E

    assert torch.autograd.gradcheck(floats, (x,))


def test_activation_checkpointing() -> None:
    x = logits(9, 20)

    def checkpointed(x: Tensor) -> sail_ops.Routing:
        return torch.utils.checkpoint.checkpoint(sail_ops.route_topk, x, 4, renormalize=True, use_reentrant=False)

    plain = testing.run(sail_ops.route_topk, x, 4, renormalize=True)
    testing.assert_same(testing.run(checkpointed, x), plain)


X, IDS = torch.ones(2, 8), torch.zeros(2, 3, dtype=torch.int64)
ERRORS = {
    "rank": ((X[0], 3), {}, r"route_topk: logits_TE: got shape \[8\], expected 2 dimensions"),
    "dtype": ((X.double(), 3), {}, "logits_TE: got .*, expected float32, bfloat16 or float16"),
    "strides": ((torch.ones(8, 2).t(), 3), {}, "logits_TE: got stride 2, expected contiguous rows"),
    "no_expert": ((X[:, :0], 1), {}, "logits_TE: got D = 0"),
    "k_zero": ((X, 0), {}, "k: got 0, expected 1 <= k <= E = 8"),
    "k_large": ((X, 9), {}, "k: got 9, expected 1 <= k <= E = 8"),
    "bias_shape": ((X, 3), {"bias_E": X[0, :7]}, r"bias_E: got shape \[7\], expected shape \[8\]"),
    "bias_dtype": ((X, 3), {"bias_E": X[0].half()}, "bias_E: got float16, expected float32"),
    "ids_shape": ((X, 2), {"ids_TK": IDS}, r"ids_TK: got shape \[2, 3\], expected shape \[2, 2\]"),
    "ids_dtype": ((X, 3), {"ids_TK": IDS.float()}, "ids_TK: got float32, expected int32 or int64"),
    "ids_negative": ((X, 3), {"ids_TK": IDS - 1}, r"ids_TK: got id -1, expected ids in \[0, 8\)"),
    "ids_large": ((X, 3), {"ids_TK": IDS + 8}, r"ids_TK: got id 8, expected ids in \[0, 8\)"),
    "mask_shape": ((X, 3), {"mask_T": torch.ones(3, dtype=torch.bool)}, r"mask_T: got shape \[3\]"),
    "mask_dtype": ((X, 3), {"mask_T": torch.ones(2)}, "mask_T: got float32, expected bool"),
}


@pytest.mark.parametrize("args, kwargs, message", ERRORS.values(), ids=ERRORS.keys())
def test_bad_input(args, kwargs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sail_ops.route_topk(*args, renormalize=True, **kwargs)


# ---- load balancing


def losses_of(x: Tensor, mask_T: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Of two layers."""
    routings = [sail_ops.route_topk(logits, 2, renormalize=True, mask_T=mask_T) for logits in (x, -x)]
    counts_ME, prob_sum_ME = (torch.stack([getattr(r, name) for r in routings]) for name in ("counts_E", "prob_sum_E"))
    return sail_ops.load_balancing_loss(counts_ME, prob_sum_ME, mask_T.sum(), group=group)


def test_balanced_routing_gives_k() -> None:
    loss = sail_ops.load_balancing_loss(torch.full((8,), 25), torch.full((8,), 12.5), 100)
    assert loss.dtype == torch.float32 and loss.item() == 2  # 200 routed rows of 100 tokens: k = 2
    collapsed = sail_ops.load_balancing_loss(torch.tensor([100] + 7 * [0]), torch.tensor([100.0] + 7 * [0.0]), 100)
    assert collapsed.item() == 8
    assert sail_ops.load_balancing_loss(torch.zeros(8).long(), torch.zeros(8), 0).item() == 0


def test_stacked_layers_are_kept_apart() -> None:
    counts_ME = torch.tensor([8 * [25], [100, 100, *6 * [0]]])  # pooled, the second would be hidden
    losses = sail_ops.load_balancing_loss(counts_ME, counts_ME / 2, 100)
    torch.testing.assert_close(losses, torch.tensor([2.0, 8.0]))
    assert sail_ops.load_balancing_loss(torch.zeros(0, 8).long(), torch.zeros(0, 8), 100).shape == (0,)


@pytest.mark.parametrize("experts", [1, 3, 64, 128, 1000])
def test_stacked_layers_are_bit_for_bit_those_of_each(experts: int) -> None:
    counts_ME = (testing.random(7, experts, seed=1).abs() * 100).long()
    prob_sum_ME = (testing.random(7, experts, seed=2).abs() * 30).requires_grad_()
    stacked = sail_ops.load_balancing_loss(counts_ME, prob_sum_ME, 333)
    layers = [sail_ops.load_balancing_loss(*row, 333) for row in zip(counts_ME, prob_sum_ME, strict=True)]
    assert torch.equal(stacked, torch.stack(layers))
    grads = [torch.autograd.grad(loss, prob_sum_ME)[0] for loss in (stacked.sum(), torch.stack(layers).sum())]
    assert grads[0].any() and torch.equal(*grads)


def test_statistics_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got shapes \[2, 8\] and \[8\]"):
        sail_ops.load_balancing_loss(torch.zeros(2, 8).long(), torch.zeros(8), 1)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    weight = testing.random(16, 8, seed=9).requires_grad_()
    tokens, mask_T = testing.random(40, 16, seed=3), torch.arange(40) % 5 > 0
    mine = slice(0, 29) if rank == 0 else slice(29, 40)  # ranks of unequal size
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as collectives:
        losses = losses_of(tokens[mine] @ weight, mask_T[mine], dist.group.WORLD)
        losses.sum().backward()
    assert collectives.call_count == 2, "want one for all layers, and one in backward"
    assert weight.grad is not None
    dist.all_reduce(weight.grad)  # what data-parallel training does: the mean over the ranks
    torch.save((losses.detach(), weight.grad / 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.cpu_only
def test_two_ranks_give_the_losses_and_gradient_of_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    weight = testing.random(16, 8, seed=9).requires_grad_()
    losses = losses_of(testing.random(40, 16, seed=3) @ weight, torch.arange(40) % 5 > 0)
    (grad,) = torch.autograd.grad(losses.sum(), weight)
    for rank in range(2):
        got_losses, got_grad = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(got_losses, losses.detach())
        torch.testing.assert_close(got_grad, grad)
