"""The accuracy rule itself: results that are right pass, results that are wrong in any of the usual ways fail."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sail_ops import reference, testing

DTYPES = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
X, W = testing.random(199, 256), 1 + testing.random(256, scale=0.2, seed=1)


def norm_case(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and weight in dtype, the fp64 result, and eager's."""
    x, weight = (X * scale).to(dtype), W.to(dtype)
    return x, weight, reference.rms_norm(x.double(), weight.double()), reference.rms_norm(x, weight)


@DTYPES
def test_another_order_of_summation_passes(dtype: torch.dtype) -> None:
    x, weight, ref, base = norm_case(dtype)
    other = F.rms_norm(x.float(), (256,), weight.float(), 1e-6).to(dtype)
    testing.assert_accurate(other, ref, base)


WRONG = {
    "zeros": lambda x, w: torch.zeros_like(x),
    "dropped_columns": lambda x, w: torch.cat(
        [reference.rms_norm(x[:, :-8], w[:-8]), reference.rms_norm(x, w)[:, -8:]], 1
    ),
    "last_column_zero": lambda x, w: reference.rms_norm(x, w) * (torch.arange(256) < 255),
    "last_row_stale": lambda x, w: torch.cat([reference.rms_norm(x, w)[:-1], x[:1]]),
    "weight_ignored": lambda x, w: reference.rms_norm(x, torch.ones_like(w)),
    "eps_ignored": lambda x, w: reference.rms_norm(x, w, 0.0),
    "rows_swapped": lambda x, w: reference.rms_norm(x, w).flip(0),
    "one_nan": lambda x, w: reference.rms_norm(x, w).index_put(
        (torch.tensor(3), torch.tensor(5)), x.new_tensor(math.nan)
    ),
    "one_inf": lambda x, w: reference.rms_norm(x, w).index_put(
        (torch.tensor(3), torch.tensor(5)), x.new_tensor(math.inf)
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@DTYPES
def test_wrong_norms_fail(dtype: torch.dtype, wrong) -> None:
    x, weight, ref, base = norm_case(dtype, scale=1e-2)  # at unit scale eps would not show
    with pytest.raises(AssertionError):
        testing.assert_accurate(wrong(x, weight).to(dtype), ref, base)


@DTYPES
def test_swapped_gate_and_up_fail(dtype: torch.dtype) -> None:
    gate, up = testing.random(64, 96, dtype=dtype), testing.random(64, 96, dtype=dtype, seed=1)
    ref, base = reference.swiglu(gate.double(), up.double()), reference.swiglu(gate, up)
    testing.assert_accurate(base, ref, base)
    with pytest.raises(AssertionError, match="budget"):
        testing.assert_accurate(reference.swiglu(up, gate), ref, base)


def test_a_dropped_expert_fails() -> None:
    case = testing.EXPERTS_CASES["odd"]
    x = testing.random(case.T, case.D)
    gate_up = testing.random(case.E, 2 * case.F, case.D, scale=case.D**-0.5, seed=1)
    down = testing.random(case.E, case.D, case.F, scale=case.F**-0.5, seed=2)
    ids, weights = testing.random_ids(case), torch.full((case.T, case.K), 1 / case.K)
    base = reference.fused_experts(x, gate_up, down, ids, weights)
    ref = reference.fused_experts(x.double(), gate_up.double(), down.double(), ids, weights.double())
    testing.assert_accurate(base, ref, base)
    lost = ids.where(ids != case.E - 1, -1)
    with pytest.raises(AssertionError, match="budget"):
        testing.assert_accurate(reference.fused_experts(x, gate_up, down, lost, weights), ref, base)


def test_shape_and_dtype_must_agree_even_when_empty() -> None:
    empty = torch.empty(0, 8)
    testing.assert_accurate(empty, empty.double(), empty)
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_accurate(empty, torch.empty(8, 0).double(), empty)
    with pytest.raises(AssertionError, match="float16"):
        testing.assert_accurate(empty.half(), empty.double(), empty)


def test_check_op_sees_a_wrong_a_missing_and_a_surplus_gradient() -> None:
    x, weight = X[:9].clone().requires_grad_(), W.clone().requires_grad_()
    testing.check_op(reference.rms_norm, reference.rms_norm, x, weight)
    with pytest.raises(AssertionError, match=r"gradient of args\[1\]"):
        testing.check_op(lambda x, w: reference.rms_norm(x, 2 * w - w.detach()), reference.rms_norm, x, weight)
    with pytest.raises(AssertionError, match=r"gradient of args\[1\]: missing"):
        testing.check_op(lambda x, w: reference.rms_norm(x, w.detach()), reference.rms_norm, x, weight)
    with pytest.raises(AssertionError, match="does not depend"):
        testing.check_op(reference.rms_norm, lambda x, w: reference.rms_norm(x, w.detach()), x, weight)


def test_check_op_compares_integers_and_reaches_into_tuples_and_keywords() -> None:
    x = testing.random(30, 8).requires_grad_()
    testing.check_op(reference.route_topk, reference.route_topk, x, 2, renormalize=True)

    def lowest(x: Tensor, k: int, *, renormalize: bool):
        routing = reference.route_topk(x, k, renormalize=renormalize)
        return routing._replace(ids_TK=routing.ids_TK.flip(1))

    with pytest.raises(AssertionError, match="output 1: integers differ"):
        testing.check_op(lowest, reference.route_topk, x, 2, renormalize=True)

    def pair(halves: tuple[Tensor, Tensor], *, scale: Tensor) -> Tensor:
        return reference.swiglu(*halves) * scale

    halves = tuple(testing.random(70, 8, seed=s).requires_grad_() for s in (0, 1))
    scale = testing.random(70, 8, seed=2).requires_grad_()
    testing.check_op(pair, pair, halves, scale=scale)
    with pytest.raises(AssertionError, match=r"kwargs\['scale'\]"):
        testing.check_op(lambda h, scale: pair(h, scale=2 * scale - scale.detach()), pair, halves, scale=scale)


def test_pooled_rows_forgive_a_row_of_one_error_but_not_a_wrong_row() -> None:
    ref = testing.random(256, 64).double()
    # every row off by one factor, as the gradient of a weight that one token reached
    factor = 1 + torch.finfo(torch.float32).eps * testing.random(2, 256, 1, seed=1).double()
    base, out = (ref * factor).float()
    with pytest.raises(AssertionError, match="rows over budget"):
        testing.assert_accurate(out, ref, base)
    testing.assert_accurate(out, ref, base, pool=64)
    out[7] *= 1 + 1e-5
    with pytest.raises(AssertionError, match="over budget|worst"):
        testing.assert_accurate(out, ref, base, pool=64)


def test_check_repeatable_sees_one_bit() -> None:
    calls = iter(range(9))
    with pytest.raises(AssertionError, match="bits"):
        testing.check_repeatable(lambda x: x * (1 + 2**-23 * (next(calls) == 7)), X, times=9)


@pytest.mark.parametrize("name", testing.EXPERTS_CASES)
def test_expert_cases_are_what_their_names_say(name: str) -> None:
    case = testing.EXPERTS_CASES[name]
    ids = testing.random_ids(case)
    assert ids.shape == (case.T, case.K) and ids.dtype == torch.int64
    if case.routing == "hot":
        assert (ids == 0).any(1).all()
    outside = (ids < 0) | (ids >= case.E)
    assert outside.any() == (case.routing == "dropped")
