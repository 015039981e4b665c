"""linear_cross_entropy: accuracy of loss, log-probabilities and both gradients, edges, memory, tracing, errors."""

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import Tensor

import sail_ops
from sail_ops import reference, testing

DTYPES = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
# a token's whole gradient shares the error of its log-sum-exp, a word's that of the few tokens it is likely for
POOL = {"args[0]": 16, "args[1]": 64}
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


class Case(NamedTuple):
    """T tokens, D hidden, V vocabulary, every `ignored`-th label is ignored (0: none)."""

    T: int
    D: int
    V: int
    ignored: int = 0


CASES = {
    "one_token": Case(1, 64, 300),
    "one_word": Case(9, 64, 1),
    "odd": Case(67, 33, 1029, 3),
    "chunks": Case(300, 64, 1100, 4),
    "two_chunks": Case(129, 64, 512),
    "wide": Case(130, 520, 530),  # more columns and rows than a task of the dense products
}


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, head and labels; logits of order two, so that no token's softmax is flat or a spike."""
    hidden = testing.random(case.T, case.D, dtype=dtype).requires_grad_()
    lm_head = testing.random(case.V, case.D, dtype=dtype, scale=2 * case.D**-0.5, seed=1).requires_grad_()
    labels = torch.randint(case.V, (case.T,), generator=torch.Generator().manual_seed(2))
    if case.ignored:
        labels[:: case.ignored] = -100
    return hidden, lm_head, labels


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@DTYPES
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_accuracy(isa: str, reduction: str, dtype: torch.dtype, case: Case) -> None:
    hidden, lm_head, labels = inputs(case, dtype)
    testing.check_op(
        sail_ops.linear_cross_entropy,
        reference.linear_cross_entropy,
        hidden,
        lm_head,
        labels,
        reduction=reduction,
        return_logprobs=True,
        pool=POOL,
    )


@DTYPES
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_z_loss_and_token_weights(isa: str, reduction: str, dtype: torch.dtype) -> None:
    hidden, lm_head, labels = inputs(CASES["odd"], dtype)
    weights = testing.random(len(labels), seed=3).exp()
    for options in ({"z_loss": 0.1}, {"token_weights": weights}, {"z_loss": 1e-2, "token_weights": weights}):
        testing.check_op(
            sail_ops.linear_cross_entropy,
            reference.linear_cross_entropy,
            hidden,
            lm_head,
            labels,
            reduction=reduction,
            pool=POOL,
            **options,
        )


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-3}, {"ignore_index": 7}, {"reduction": "none"}], ids=str)
def test_is_torchs_cross_entropy(options: dict[str, Any]) -> None:
    """The reference too is ours: here is torch's own function."""
    hidden, lm_head, labels = (t.detach() for t in inputs(CASES["odd"], torch.float32))
    labels[labels == -100] = 7
    z_loss = options.pop("z_loss", 0.0)
    logits = hidden @ lm_head.t()
    want = F.cross_entropy(logits, labels, **options) + z_loss * logits.logsumexp(1).square().mean()
    torch.testing.assert_close(sail_ops.linear_cross_entropy(hidden, lm_head, labels, z_loss=z_loss, **options), want)


@pytest.mark.parametrize("which", [(1, 0), (0, 1)])
@REDUCTIONS
def test_only_wanted_gradients(reduction: str, which: tuple[int, int]) -> None:
    hidden, lm_head, labels = inputs(CASES["chunks"], torch.float32)
    args = hidden.requires_grad_(bool(which[0])), lm_head.requires_grad_(bool(which[1])), labels
    testing.check_op(
        sail_ops.linear_cross_entropy, reference.linear_cross_entropy, *args, reduction=reduction, pool=POOL
    )


@REDUCTIONS
@pytest.mark.parametrize("T", [0, 5])
def test_no_labeled_token_is_as_in_torch(reduction: str, T: int) -> None:
    hidden, lm_head = testing.random(T, 64).requires_grad_(), testing.random(40, 64, seed=1).requires_grad_()
    labels = torch.full((T,), -100)
    got = sail_ops.linear_cross_entropy(hidden, lm_head, labels, reduction=reduction)
    want = F.cross_entropy(hidden @ lm_head.t(), labels, reduction=reduction)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())
    gradients = torch.autograd.grad(got.sum(), (hidden, lm_head))
    assert [g.shape for g in gradients] == [hidden.shape, lm_head.shape] and not any(g.any() for g in gradients)


def test_leading_dimensions_and_strides() -> None:
    hidden, lm_head, labels = inputs(Case(60, 32, 77, 5), torch.float32)
    wide = testing.random(60, 64, seed=5)
    wide[:, 32:] = hidden.detach()
    batched = wide.reshape(4, 15, 64)[..., 32:]
    by_column = lm_head.detach().t().contiguous().t()  # a head kept as [D, V]
    inside = torch.cat((by_column, by_column))[77:]  # of a larger tensor
    for reduction in ("mean", "none"):
        want = sail_ops.linear_cross_entropy(hidden, lm_head, labels, reduction=reduction)
        for head in (by_column, inside):
            got = sail_ops.linear_cross_entropy(batched, head, labels.reshape(4, 15).int(), reduction=reduction)
            torch.testing.assert_close(got.flatten(), want.detach().flatten())


@DTYPES
def test_ignored_tokens_are_not_read(dtype: torch.dtype) -> None:
    hidden, lm_head, labels = (t.detach() for t in inputs(CASES["odd"], dtype))
    hidden[labels == -100] = math.nan
    hidden.requires_grad_()
    loss = sail_ops.linear_cross_entropy(hidden, lm_head, labels)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss.isfinite() and grad.isfinite().all()


@DTYPES
def test_large_and_masked_logits(isa: str, dtype: torch.dtype) -> None:
    """A softmax that is a spike, and words that a mask has taken out of the vocabulary."""
    hidden = torch.eye(64, dtype=dtype).requires_grad_()
    lm_head = testing.random(1100, 64, dtype=dtype, scale=60).requires_grad_()
    labels = lm_head.detach().argmax(0)
    one_each = {"args[0]": 64, "args[1]": 1100}  # a token is alone in its column
    testing.check_op(
        sail_ops.linear_cross_entropy, reference.linear_cross_entropy, hidden, lm_head, labels, pool=one_each
    )
    masked = lm_head.detach().clone()
    masked[64:] = -math.inf  # whole blocks
    weights = torch.zeros(1, 64, dtype=dtype)
    weights[0, 3] = 1
    got = sail_ops.linear_cross_entropy(weights[:, 3:4], masked[:, 3:4], torch.tensor([5]))
    want = F.cross_entropy(masked[:, 3].double()[None], torch.tensor([5]))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_infinite_and_nan_logits_as_in_torch(isa: str) -> None:
    hidden, labels = torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)
    for bad in (math.inf, math.nan):
        lm_head = torch.zeros(70, 1)
        lm_head[69] = bad
        got = sail_ops.linear_cross_entropy(hidden, lm_head, labels)
        assert got.isnan() == F.cross_entropy(lm_head.t(), labels).isnan()


def test_half_precision_gradients_do_not_underflow() -> None:
    """A loss scaler multiplies the mean by 2^16: what fp16 cannot hold before, it must hold after."""
    hidden, lm_head, labels = inputs(Case(512, 64, 5000), torch.float16)
    exact = [t.detach().double().requires_grad_() for t in (hidden, lm_head)]
    results = []
    for (h, w), function in (
        ((hidden, lm_head), sail_ops.linear_cross_entropy),
        (exact, reference.linear_cross_entropy),
    ):
        results.append(torch.autograd.grad(function(h, w, labels), (h, w), torch.tensor(65536.0).to(exact[0].dtype)))
    for got, want in zip(*results, strict=True):
        assert (got.double() - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_half_precision_gradients_do_not_overflow(isa: str, reduction: str, weighted: bool) -> None:
    """Every token has one label: its row of the sum's gradient is beyond fp16, divided by the count it is not."""
    T = 8192
    hidden = torch.full((T, 16), 10.0, dtype=torch.float16)
    lm_head = testing.random(40, 16, dtype=torch.float16, scale=0.02)
    labels = torch.full((T,), 3)
    labels[::64] = -100
    weights = testing.random(T, seed=3).exp() * 1e3 if weighted else None
    # a sum is divided outside, as transformers' trainer does
    count = 1 if reduction == "mean" else T if weights is None else weights.sum()
    results = []
    for dtype, function in (
        (torch.float64, reference.linear_cross_entropy),
        (torch.float16, sail_ops.linear_cross_entropy),
    ):
        h, w = (t.to(dtype).requires_grad_() for t in (hidden, lm_head))
        loss = function(h, w, labels, reduction=reduction, token_weights=weights) / count
        results.append(torch.autograd.grad(loss, (h, w), torch.tensor(256.0).to(loss.dtype)))
    for want, got in zip(*results, strict=True):
        assert (got.double() - want).norm() < 0.01 * want.norm()


def test_half_precision_weights_of_nothing_have_no_gradient() -> None:
    hidden, lm_head, labels = inputs(CASES["odd"], torch.float16)
    for reduction in ("mean", "sum"):
        loss = sail_ops.linear_cross_entropy(
            hidden, lm_head, labels, reduction=reduction, token_weights=torch.zeros(len(labels))
        )
        assert not any(g.any() for g in torch.autograd.grad(loss, (hidden, lm_head)))


def test_same_bits_every_time_and_for_any_number_of_threads(isa: str) -> None:
    args = inputs(CASES["chunks"], torch.float32)
    for reduction in ("mean", "none"):
        testing.check_repeatable(sail_ops.linear_cross_entropy, *args, times=5, reduction=reduction)


def test_our_part_has_the_same_bits_for_any_number_of_threads(isa: str) -> None:
    """Torch's products may split their sums by threads; with one hidden feature there is nothing to split."""
    case = Case(200, 1, 5000, 3)
    hidden, lm_head, labels = inputs(case, torch.bfloat16)
    hidden.requires_grad_(False)
    first = testing.run(sail_ops.linear_cross_entropy, hidden, lm_head.detach(), labels, return_logprobs=True)
    before = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            again = testing.run(sail_ops.linear_cross_entropy, hidden, lm_head.detach(), labels, return_logprobs=True)
            testing.assert_same(again, first)
    finally:
        torch.set_num_threads(before)


def test_no_tensor_has_all_logits() -> None:
    case = Case(1024, 16, 3000)
    hidden, lm_head, labels = inputs(case, torch.float32)
    logits = case.T * case.V * 4
    if DEVICE == "cuda":  # everything that is there at once, the allocator's rounding included
        for _ in range(2):  # the first time also cuBLAS takes its workspace
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            sail_ops.linear_cross_entropy(hidden, lm_head, labels).backward()
        assert torch.cuda.max_memory_allocated() - before < logits / 2
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        sail_ops.linear_cross_entropy(hidden, lm_head, labels).backward()
    sizes = [e.cpu_memory_usage for e in profile.events()]
    assert 0 < max(sizes) <= logits / 8 + 16 * case.V * 4


def test_a_second_backward_is_refused() -> None:
    hidden, lm_head, labels = inputs(CASES["odd"], torch.float32)
    loss = sail_ops.linear_cross_entropy(hidden, lm_head, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    per_token = sail_ops.linear_cross_entropy(hidden, lm_head, labels, reduction="none").sum()
    for _ in range(2):
        torch.autograd.grad(per_token, hidden, retain_graph=True)


def test_tracing() -> None:
    hidden, lm_head, labels = inputs(CASES["odd"], torch.bfloat16)
    for options in ({}, {"reduction": "sum", "z_loss": 1e-3}, {"reduction": "none", "return_logprobs": True}):
        testing.check_traceable(sail_ops.linear_cross_entropy, hidden, lm_head, labels, **options)


def test_opcheck() -> None:
    hidden, lm_head, labels = (t.detach() for t in inputs(CASES["odd"], torch.float32))
    ops, ones = torch.ops.sail_ops, torch.ones(len(labels))
    for scale, *needs in ((None, True, True), (ones, True, False), (ones, False, False)):
        torch.library.opcheck(ops.linear_cross_entropy.default, (hidden, lm_head, labels, scale, -100, 1e-3, *needs))


def test_reference_gradients() -> None:
    hidden, lm_head, labels = inputs(Case(5, 4, 7, 2), torch.float32)
    wide = [t.detach().double().requires_grad_() for t in (hidden, lm_head)]
    assert torch.autograd.gradcheck(lambda h, w: reference.linear_cross_entropy(h, w, labels, z_loss=0.1), wide)


def test_autocast_takes_its_dtype() -> None:
    hidden, lm_head, labels = inputs(CASES["odd"], torch.float32)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        loss = sail_ops.linear_cross_entropy(hidden, lm_head, labels)
    loss.backward()
    want = sail_ops.linear_cross_entropy(hidden.detach().bfloat16(), lm_head.detach().bfloat16(), labels)
    assert torch.equal(loss.detach(), want) and hidden.grad is not None and hidden.grad.dtype == torch.float32


def test_activation_checkpointing() -> None:
    args = inputs(CASES["odd"], torch.float32)

    def checkpointed(*args: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(sail_ops.linear_cross_entropy, *args, use_reentrant=False)

    testing.assert_same(testing.run(checkpointed, *args), testing.run(sail_ops.linear_cross_entropy, *args))


H, W, L = torch.ones(3, 8), torch.ones(5, 8), torch.tensor([0, 4, -100])
ERRORS = {
    "label_high": ((H, W, L + 1), {}, r"labels: got 5 at token 1, expected a label in \[0, 5\) or ignore_index, -100"),
    "label_low": ((H, W, L), {"ignore_index": 4}, "labels: got -100 at token 2"),
    "label_dtype": ((H, W, L.float()), {}, "labels: got float32, expected int32 or int64"),
    "label_shape": ((H, W, L[:2]), {}, r"labels: got shape \[2\], expected hidden's"),
    "head_width": ((H, W[:, :7], L), {}, r"lm_head: got shape \[5, 7\], expected shape \[5, 8\]"),
    "head_rank": ((H, W[0], L), {}, r"lm_head: got shape \[8\], expected 2 dimensions"),
    "head_dtype": ((H, W.half(), L), {}, "lm_head: got float16, expected float32"),
    "hidden_dtype": ((H.long(), W, L), {}, "hidden: got int64, expected float32, bfloat16 or float16"),
    "no_words": ((H, W[:0], L), {}, "lm_head: got V = 0"),
    "no_features": ((H[:, :0], W[:, :0], L), {}, "hidden: got D = 0"),
    "reduction": ((H, W, L), {"reduction": "max"}, "reduction: got 'max', expected one of"),
    "z_loss": ((H, W, L), {"z_loss": -1.0}, "z_loss: got -1.0"),
    "weights_shape": ((H, W, L), {"token_weights": torch.ones(2)}, r"token_weights: got shape \[2\]"),
    "weights_dtype": ((H, W, L), {"token_weights": torch.ones(3).half()}, "token_weights: got float16"),
}


@pytest.mark.parametrize("args, options, message", ERRORS.values(), ids=ERRORS.keys())
def test_bad_input(args: tuple[Tensor, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        sail_ops.linear_cross_entropy(*args, **options)
