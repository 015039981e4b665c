"""The CUDA library's own behaviour, on the emulator: the whole layer against fp64 with poisoned workspaces, cards,
values out of range. `SAIL_TEST_DEVICE=emulated pytest tests/ops/test_moe.py ...` runs the CPU's tests on it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from emulated_library import build, emulated
from expert_layer import POOL, biases, layer, offsets
from torch import Tensor

import sail_ops
from sail_ops import _library, reference, testing
from sail_ops.testing import ExpertsCase

CASE = ExpertsCase(37, 48, 40, 5, 2, "dropped")
POOLED = dict.fromkeys(("args[1]", "args[2]"), POOL)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def cuda_library() -> Iterator[None]:
    """Every tensor that the library allocates starts as NaN, integers as their largest value."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    try:
        with emulated():
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@HALVES
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
def test_layer(dtype: torch.dtype, recompute: bool) -> None:
    def op(*args: Tensor, **kwargs: object) -> Tensor:
        return sail_ops.fused_experts(*args, recompute=recompute, **kwargs)

    args, options = layer(CASE, dtype), {"biases": biases(CASE, dtype), "clamp": 2.0, "activation": "gelu_tanh"}
    testing.check_op(op, reference.fused_experts, *args, pool=POOLED, **options)


@HALVES
def test_sorted_layer_with_tail(dtype: torch.dtype) -> None:
    x, gate_up, down, _, weights = layer(CASE, dtype)
    args = x, gate_up, down, offsets(9, 0, 17, 1, 2), weights[:, 0].detach().requires_grad_()
    testing.check_op(sail_ops.grouped_experts, reference.grouped_experts, *args, pool=POOLED)


def test_offsets_out_of_range_stay_inside() -> None:
    """Without SAIL_OPS_CHECK nothing is raised; ends count as the nearest that never fall and stay within the rows."""
    x, gate_up, down, _, _ = (t.detach() for t in layer(CASE, torch.bfloat16))
    bad = torch.tensor([-5, 12, 3, 1000, 20]).int()
    good = torch.tensor([0, 12, 12, 37, 37]).int()
    for ends in (bad, bad.repeat_interleave(2)[::2]):
        got, want = (sail_ops.grouped_experts(x, gate_up, down, e) for e in (ends, good))
        assert torch.equal(got, want)
        got, want = (sail_ops.grouped_mm(x, gate_up.transpose(1, 2), e) for e in (ends, good))
        assert torch.equal(got, want)


def test_replayed_ids_out_of_range_weigh_nothing() -> None:
    logits = testing.random(3, 8).requires_grad_()
    ids = torch.tensor([[0, 8], [-1, 3], [2**40, -(2**40)]])
    routing = sail_ops.route_topk(logits, 2, renormalize=False, ids_TK=ids)
    assert torch.equal(routing.weights_TK == 0, (ids < 0) | (ids >= 8)) and routing.counts_E.sum() == 2
    (grad,) = torch.autograd.grad(routing.weights_TK.sum(), logits)
    assert grad.isfinite().all() and not grad[2].any()


def test_fp32_experts_are_refused() -> None:
    for call in (
        lambda: sail_ops.fused_experts(*layer(CASE)),
        lambda: sail_ops.grouped_mm(testing.random(37, 8), testing.random(5, 8, 8), offsets(1, 2, 3, 4, 5)),
    ):
        with pytest.raises(ValueError, match="x: got float32, expected bfloat16 or float16 on a CUDA device"):
            call()


def test_too_many_experts() -> None:
    x, E = torch.zeros(1, 8, dtype=torch.bfloat16), 12033
    weights = x.new_zeros(E, 2, 8), x.new_zeros(E, 8, 1)
    with pytest.raises(ValueError, match="down: got E = 12033, expected at most 12032 experts"):
        sail_ops.fused_experts(x, *weights, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))
    assert sail_ops.route_topk(torch.zeros(1, 3072), 1, renormalize=True).counts_E.sum() == 1
    with pytest.raises(ValueError, match="logits_TE: got E = 3073, expected at most 3072 experts on a CUDA device"):
        sail_ops.route_topk(torch.zeros(1, 3073), 1, renormalize=True)


# ---- what is decided once a process: the card, and whether values are checked

PROBE = """
import sys, torch
sys.path.insert(0, {support!r})
from emulated_library import emulated
from expert_layer import layer, offsets
import sail_ops
from sail_ops import reference, testing
case = testing.ExpertsCase(37, 48, 40, 5, 2)
x, gate_up, down, ids, weights = (t.detach() for t in layer(case, torch.bfloat16))
with emulated():
    try:
        {code}
    except (RuntimeError, ValueError) as error:
        print(type(error).__name__, error)
"""


def probe(code: str, **environment: str) -> str:
    build()
    script = PROBE.format(support=str(Path(__file__).parents[1] / "support"), code=code)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


LAYER = "y = sail_ops.fused_experts(x, gate_up, down, ids, weights)"


@pytest.mark.parametrize("card, arch", [("7.5", "75"), ("10.0", "100"), ("12.0", "120"), ("9.0", "90")])
def test_unsupported_card(card: str, arch: str) -> None:
    said = probe(LAYER, SAIL_EMULATED_CARD=f"{card} 4 101376")
    name = f"RuntimeError sail_ops.fused_experts: no CUDA kernel for the emulator (sm_{arch}): this library was built"
    assert said.startswith(f"{name} for sm_80")
    assert ("not supported" if card < "8" and card[0] == "7" else f'SAIL_OPS_CUDA_ARCHS="{arch}') in said


@pytest.mark.parametrize("card", ["8.6 2 101376", "8.9 5 101376", "8.0 1 166912"])
def test_smaller_cards_give_the_same_bits(card: str) -> None:
    """99 KB of shared memory (sm_86, sm_89), and another number of multiprocessors."""
    code = LAYER + "; print(y.view(torch.int16).long().sum().item(), y.isfinite().all().item())"
    want = probe(code)
    assert want.endswith("True") and probe(code, SAIL_EMULATED_CARD=card) == want


def test_a_refused_launch_names_the_operator() -> None:
    """A card of compute capability 8 whose blocks have too little shared memory for a product."""
    assert probe(LAYER, SAIL_EMULATED_CARD="8.0 3 50000") == "RuntimeError sail_ops.fused_experts: CUDA: invalid value"


def test_values_are_checked_on_demand() -> None:
    fall = "sail_ops.grouped_experts(x, gate_up, down, torch.tensor([3, 2, 6, 7, 8]).int())"
    assert probe(fall, SAIL_OPS_CHECK="1").startswith(
        "ValueError sail_ops.grouped_experts: offsets: got 2 at 1 after 3, expected ends that never fall"
    )
    assert probe(fall) == ""
    replay = "sail_ops.route_topk(torch.zeros(2, 4), 1, renormalize=True, ids_TK=torch.tensor([[0], [4]]).int())"
    assert (
        probe(replay, SAIL_OPS_CHECK="1") == "ValueError sail_ops.route_topk: ids_TK: got id 4, expected ids in [0, 4)"
    )


@pytest.mark.parametrize("name", ["sm90", "cutlass"])
def test_unknown_kernels_are_refused(name: str) -> None:
    said = probe(LAYER, SAIL_OPS_CUDA_KERNELS=name)
    assert said.startswith(f"ValueError sail_ops: SAIL_OPS_CUDA_KERNELS: got '{name}', expected sm80 or cluster; ")


def test_kernels_are_switched_in_a_process() -> None:
    """What the benchmarks of a card do to time a row by clusters beside the others."""
    library = _library._load(build(), sail_cuda_set_kernels=_library._text)
    answers = [library.sail_cuda_set_kernels(name) for name in (b"cluster", b"clusters", b"")]
    assert answers[0] == answers[2] == b"" and answers[1].startswith(
        b"error: sail_ops: SAIL_OPS_CUDA_KERNELS: got 'clu"
    )
    assert probe(LAYER, SAIL_OPS_CUDA_KERNELS="cluster") == ""  # known, and nothing to an A100
