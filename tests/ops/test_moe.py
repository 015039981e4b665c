"""fused_experts: accuracy of the output and of every gradient, routings, dropped ids, layouts, repeatability."""

import subprocess
import sys
from functools import partial

import numpy
import pytest
import torch
from expert_layer import POOL, Layer, batch, biases, counts, layer, leaf, one_by_one
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sail_ops
from sail_ops import reference, testing
from sail_ops.testing import EXPERTS_CASES, ExpertsCase

DTYPES = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
SMALL = ExpertsCase(37, 48, 40, 4, 2)
POOLED = dict.fromkeys(("args[1]", "args[1][0]", "args[1][1]", "args[2]"), POOL)


def check(args: Layer, **kwargs) -> None:
    testing.check_op(sail_ops.fused_experts, reference.fused_experts, *args, pool=POOLED, **kwargs)


@pytest.mark.parametrize("case", EXPERTS_CASES.values(), ids=EXPERTS_CASES.keys())
@DTYPES
def test_accuracy(isa: str, dtype: torch.dtype, case: ExpertsCase) -> None:
    few = 0 < case.T < 10  # so few numbers that their error is a matter of chance: more problems, judged as one
    args = batch([layer(case, dtype, seed=10 * i) for i in range((6 if case.D > 9 else 40) if few else 1)])
    pool = dict.fromkeys(POOLED, 4096) if few else POOLED
    testing.check_op(one_by_one(sail_ops.fused_experts), one_by_one(reference.fused_experts), *args, pool=pool)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@DTYPES
def test_activations_with_biases_clamp_and_pair(isa: str, dtype: torch.dtype, activation: str) -> None:
    args = layer(SMALL, dtype, pair=True)
    check(args, activation=activation, biases=biases(SMALL, dtype), clamp=1.0)
    check(args, activation=activation)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@DTYPES
def test_dtypes_of_ids_and_weights(dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    args = layer(SMALL, dtype, weights_dtype=dtype)
    check(args._replace(ids=args.ids.to(ids_dtype)))


SIZES = {
    "many_rows_an_expert": ExpertsCase(1300, 64, 48, 3, 2, "hot"),
    "several_blocks_of_F": ExpertsCase(19, 40, 2100, 2, 1),
    "several_blocks_of_D": ExpertsCase(19, 2100, 24, 2, 1),
    "more_experts_a_token_than_are_added_at_once": ExpertsCase(5, 64, 16, 70, 70),
}


@pytest.mark.parametrize("case", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_past_one_block(isa: str, dtype: torch.dtype, case: ExpertsCase) -> None:
    check(layer(case, dtype), biases=biases(case, dtype))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 40),
    D=st.integers(8, 140),
    F=st.integers(8, 140),
    E=st.integers(1, 9),
    routing=st.sampled_from(["uniform", "hot", "dropped"]),
    data=st.data(),
)
def test_any_shape_and_routing(T: int, D: int, F: int, E: int, routing: str, data: st.DataObject) -> None:
    K = data.draw(st.integers(1, E))
    args = layer(ExpertsCase(T, D, F, E, K, routing))
    ids = torch.tensor(data.draw(st.lists(st.integers(-2, E + 1), min_size=T * K, max_size=T * K)), dtype=torch.int64)
    args = args if data.draw(st.booleans()) else args._replace(ids=ids.reshape(T, K))  # an expert may come twice
    check(args, k=testing.CHANCE)


# ---- ids


@DTYPES
def test_dropped_ids_read_nothing_and_add_nothing(isa: str, dtype: torch.dtype) -> None:
    args = layer(EXPERTS_CASES["dropped"], dtype)
    E = args.down.shape[0]
    args.ids[:3] = -1
    dropped = (args.ids < 0) | (args.ids >= E)
    whole = dropped.all(1)
    assert dropped.any() and whole.any() and not whole.all()
    x, weights = args.x.detach().clone(), args.weights.detach().clone()
    x[whole], weights[dropped] = torch.nan, torch.nan
    poisoned = args._replace(x=x.requires_grad_(), weights=weights.requires_grad_())
    got, want = (testing.run(sail_ops.fused_experts, *a) for a in (poisoned, args))
    testing.assert_same(got, want)
    assert not got.outputs[0][whole].any()
    assert not got.gradients["args[0]"][whole].any() and not got.gradients["args[4]"][dropped].any()
    # what another expert of weight zero in their place would give; not its bits: other rows meet in a tile
    elsewhere = args._replace(ids=torch.where(dropped, 0, args.ids), weights=args.weights.detach() * ~dropped)
    wide = [t.double() if t.is_floating_point() else t for t in elsewhere]
    ref, base = reference.fused_experts(*wide), reference.fused_experts(*elsewhere)
    testing.assert_accurate(want.outputs[0], ref, base)


def test_all_ids_dropped() -> None:
    args = layer(SMALL)
    result = testing.run(sail_ops.fused_experts, *args._replace(ids=args.ids - 9), biases=biases(SMALL, torch.float32))
    for t in (*result.outputs, *result.gradients.values()):
        assert t is not None and not t.any()


@DTYPES
def test_experts_without_rows_have_an_exactly_zero_gradient(isa: str, dtype: torch.dtype) -> None:
    case = EXPERTS_CASES["empty_experts"]
    args = layer(case, dtype)
    empty = counts(args.ids, case.E) == 0
    assert empty.any() and not empty.all()
    gradients = testing.run(sail_ops.fused_experts, *args).gradients
    for name in ("args[1]", "args[2]"):
        assert torch.equal(gradients[name].flatten(1).any(1), ~empty)


# ---- layouts


def wider(t: Tensor) -> Tensor:
    """Rows with something else between them, the first at no multiple of 16 bytes."""
    room = torch.full((t.shape[0], t.shape[1] + 4), 999, dtype=t.dtype)
    return room[:, 1:-3].copy_(t)


def shifted(t: Tensor) -> Tensor:
    return t.new_empty(t.numel() + 1)[1:].copy_(t.flatten()).view(t.shape)


@pytest.mark.parametrize("layout", [wider, shifted, lambda t: t.repeat_interleave(2, 0)[::2]])
@DTYPES
def test_layouts_are_read_in_place(isa: str, dtype: torch.dtype, layout) -> None:
    args = layer(ExpertsCase(37, 77, 33, 4, 2), dtype)
    x, ids, weights = (layout(t.detach()) for t in (args.x, args.ids, args.weights))
    moved = args._replace(x=x.requires_grad_(), ids=ids, weights=weights.requires_grad_())
    testing.assert_same(testing.run(sail_ops.fused_experts, *moved), testing.run(sail_ops.fused_experts, *args))


def test_routing_by_columns() -> None:
    args = layer(SMALL)
    by_columns = args._replace(ids=args.ids.t().contiguous().t(), weights=args.weights.detach().t().contiguous().t())
    assert torch.equal(sail_ops.fused_experts(*by_columns), sail_ops.fused_experts(*args))


def test_shifted_weights() -> None:
    args = layer(SMALL, torch.bfloat16)
    moved = args._replace(
        gate_up=shifted(args.gate_up.detach()).requires_grad_(), down=shifted(args.down.detach()).requires_grad_()
    )
    check(moved)
    if not moved.x.is_cuda:  # there other kernels take what the copy engine cannot read
        testing.assert_same(testing.run(sail_ops.fused_experts, *moved), testing.run(sail_ops.fused_experts, *args))


def test_pair_is_the_same_as_one_tensor() -> None:
    one, pair = (testing.run(sail_ops.fused_experts, *layer(SMALL, torch.bfloat16, pair=p)) for p in (False, True))
    assert torch.equal(one.outputs[0], pair.outputs[0])
    halves = torch.cat([pair.gradients["args[1][0]"], pair.gradients["args[1][1]"]], 1)
    assert torch.equal(one.gradients["args[1]"], halves)


# ---- repeatability


@DTYPES
def test_same_bits_every_time_and_for_any_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    args = layer(ExpertsCase(150, 72, 56, 6, 3), dtype)
    testing.check_repeatable(sail_ops.fused_experts, *args)
    first = testing.run(sail_ops.fused_experts, *args)
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            testing.assert_same(testing.run(sail_ops.fused_experts, *args), first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("F", [33, 1100])
@DTYPES
def test_recompute_gives_the_same_bits(isa: str, dtype: torch.dtype, F: int) -> None:
    case = ExpertsCase(41, 40, F, 3, 2)
    args, options = layer(case, dtype), {"biases": biases(case, dtype), "clamp": 1.5}
    again = partial(sail_ops.fused_experts, recompute=True)
    testing.assert_same(testing.run(again, *args, **options), testing.run(sail_ops.fused_experts, *args, **options))


@pytest.mark.slow
@pytest.mark.cpu_only
def test_weights_of_more_than_2_31_elements() -> None:
    """Only the last expert's pages are ever touched: 26 GB of addresses, a few MB of memory."""
    E, D, F = 2**18 + 1, 128, 64
    args = layer(ExpertsCase(9, D, F, 1, 1), torch.bfloat16)
    sizes = (E, 2 * F, D), (E, D, F)
    gate_up, down = (torch.empty(s, dtype=torch.bfloat16) for s in sizes)
    assert down.numel() > 2**31
    gate_up[-1], down[-1] = args.gate_up.detach()[0], args.down.detach()[0]
    big = args._replace(gate_up=gate_up.requires_grad_(), down=down.requires_grad_(), ids=args.ids + E - 1)
    # torch.zeros would write every page
    buffers = tuple(torch.from_numpy(numpy.zeros(s, numpy.int16)).view(torch.bfloat16) for s in sizes)
    y = sail_ops.fused_experts(*big, main_grads=buffers)
    dy = testing.random(*y.shape, dtype=y.dtype)
    y.backward(dy)
    want = sail_ops.fused_experts(*args)
    want.backward(dy)
    assert torch.equal(y, want)
    for got, one in zip(buffers, (args.gate_up, args.down), strict=True):
        assert torch.equal(got[-1], one.grad[0]) and not got[0].any() and not got[-2].any()


def test_leaf_gradients_accumulate() -> None:
    args = layer(SMALL)
    for _ in range(2):
        sail_ops.fused_experts(*args).sum().backward()
    once = leaf(args.x, torch.float32)
    sail_ops.fused_experts(once, *args[1:]).sum().backward()
    assert torch.equal(args.x.grad, 2 * once.grad)


@pytest.mark.cpu_only
def test_empty_cache_gives_kept_buffers_back() -> None:
    """In a process of its own: 25 MB of rows and activations are resident until they are freed."""
    code = """
import torch, sail_ops
from benchmarks.memory import resident_bytes
T, D, F, E, K = 1024, 512, 256, 4, 16
x, ids = torch.ones(T, D, dtype=torch.bfloat16), torch.arange(T * K).view(T, K) % E
layer = torch.ones(E, 2 * F, D, dtype=torch.bfloat16), torch.ones(E, D, F, dtype=torch.bfloat16)
sail_ops.fused_experts(x, *layer, ids, torch.ones(T, K, dtype=torch.bfloat16))
before = resident_bytes("VmRSS")
sail_ops.empty_cache()
print(before - resident_bytes("VmRSS"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0.75 * 1024 * 16 * (512 + 256) * 2
