"""linear_cross_entropy's CUDA sources, host and kernel, on the emulator; the products are torch's on the CPU."""

from collections.abc import Iterator
from typing import Any

import cuda_mutants
import pytest
import torch
from conftest import DEVICE
from cuda_mutants import Mutant
from emulated_library import emulated
from torch import Tensor

import sail_ops
from sail_ops import reference, testing

SOURCES = ("loss", "card")
DTYPES = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
# as tests/ops/test_loss.py says; of a larger vocabulary, a word's gradient comes from fewer tokens
POOL = {"args[0]": 16, "args[1]": 64}
LARGE_POOL = {"args[0]": 16, "args[1]": 1250}
# T, D, V; a row of 8192 words in bf16 is one turn of a block's threads
CASES = {
    "one_token": (1, 64, 1000),
    "one_word": (9, 64, 1),
    "odd": (67, 33, 1029),
    "several_turns": (13, 64, 20000),
    "chunks": (150, 64, 264),
}


@pytest.fixture(autouse=True)
def cuda() -> Iterator[None]:
    if DEVICE != "cpu":  # conftest has seen to it
        yield
        return
    with emulated(only=SOURCES):
        yield


def inputs(case: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, head and labels, every third of them ignored."""
    T, D, V = case
    hidden = testing.random(T, D, dtype=dtype).requires_grad_()
    lm_head = testing.random(V, D, dtype=dtype, scale=2 * D**-0.5, seed=1).requires_grad_()
    labels = torch.randint(V, (T,), generator=torch.Generator().manual_seed(2))
    labels[1::3] = -100
    return hidden, lm_head, labels


def check(case: tuple[int, int, int], dtype: torch.dtype, **options: Any) -> None:
    args = inputs(case, dtype)
    pool = LARGE_POOL if case[2] == 20000 else POOL
    testing.check_op(sail_ops.linear_cross_entropy, reference.linear_cross_entropy, *args, pool=pool, **options)


@DTYPES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_accuracy(reduction: str, dtype: torch.dtype, case: tuple[int, int, int]) -> None:
    check(case, dtype, reduction=reduction, return_logprobs=True)


@DTYPES
def test_z_loss_and_token_weights(dtype: torch.dtype) -> None:
    weights = testing.random(CASES["odd"][0], seed=3).exp()
    check(CASES["odd"], dtype, reduction="sum", z_loss=1e-2, token_weights=weights)


def test_int32_and_strided_labels() -> None:
    hidden, lm_head, labels = inputs(CASES["odd"], torch.float32)
    want = sail_ops.linear_cross_entropy(hidden, lm_head, labels)
    assert torch.equal(sail_ops.linear_cross_entropy(hidden, lm_head, labels.int()), want)
    assert torch.equal(sail_ops.linear_cross_entropy(hidden, lm_head, labels.repeat_interleave(2)[::2]), want)


@pytest.mark.parametrize("T", [0, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_labeled_token(reduction: str, T: int) -> None:
    hidden, lm_head = testing.random(T, 64).requires_grad_(), testing.random(40, 64, seed=1).requires_grad_()
    loss = sail_ops.linear_cross_entropy(hidden, lm_head, torch.full((T,), -100), reduction=reduction)
    for grad in torch.autograd.grad(loss.sum(), (hidden, lm_head)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_large_and_infinite_logits() -> None:
    """exp of the logits themselves would overflow; a word of -inf has no probability and gets no gradient."""
    hidden, lm_head = torch.eye(3, 64), testing.random(300, 64, scale=100.0, seed=1)
    lm_head[7] = -torch.inf
    lm_head[7, 3:] = 0
    hidden.requires_grad_()
    labels = torch.tensor([0, 1, 299])
    loss = sail_ops.linear_cross_entropy(hidden, lm_head.nan_to_num(neginf=-3e38), labels, reduction="none")
    want = reference.linear_cross_entropy(
        hidden.double(), lm_head.double().nan_to_num(neginf=-3e38), labels, reduction="none"
    )
    torch.testing.assert_close(loss.double(), want)


def test_a_label_out_of_range_is_a_nan_and_reads_nothing() -> None:
    if DEVICE != "cpu":
        pytest.skip("checked under SAIL_OPS_CHECK=1, which tests of a device set")
    hidden, lm_head = testing.random(4, 64), testing.random(40, 64, seed=1)
    labels = torch.tensor([3, -1, 40, 2**40])
    losses = sail_ops.linear_cross_entropy(hidden, lm_head, labels, reduction="none")
    assert losses[0].isfinite() and losses[1:].isnan().all()


@pytest.mark.parametrize("case", [CASES["odd"], CASES["several_turns"]], ids=str)
def test_any_order_of_threads_gives_the_same_bits(case: tuple[int, int, int]) -> None:
    testing.check_repeatable(sail_ops.linear_cross_entropy, *inputs(case, torch.bfloat16), times=4)


def check_loss() -> None:
    check(CASES["odd"], torch.float32, reduction="sum", z_loss=0.1, return_logprobs=True)
    check(CASES["several_turns"], torch.bfloat16, return_logprobs=True)


def check_chunks() -> None:
    check(CASES["chunks"], torch.float32)


KERNEL = "kernels/softmax_loss.cuh"
MUTANTS = {
    "a sum not rescaled": Mutant(KERNEL, "next.sum *= expf(s.max - next.max);", "", check_loss),
    "last vector dropped": Mutant(KERNEL, "(V - c + step - 1) / step, step)", "(V - c) / step, step)", check_loss),
    "label not subtracted": Mutant(KERNEL, "* p - static_cast<double>(scale)", "* p", check_loss),
    "no gradient of the z-loss": Mutant(KERNEL, "(1 + 2 * a.z_loss * lse)", "1", check_loss),
    "a warp's sum left out": Mutant(
        KERNEL,
        "int i = 0; i < kLossThreads / 32; i++)\n    sum",
        "int i = 1; i < kLossThreads / 32; i++)\n    sum",
        check_loss,
    ),
    "head's gradient of the last chunk": Mutant("loss.cu", "x_nD, first > 0);", "x_nD, false);", check_chunks),
    "first labels for every chunk": Mutant(
        "loss.cu", "labels + first * a.label_stride", "labels + 0 * a.label_stride", check_chunks
    ),
}


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return cuda_mutants.failures("test_cuda_loss")


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="mutants are emulated")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(failures: dict[str, str], name: str) -> None:
    assert failures[name] and not failures["none"]
