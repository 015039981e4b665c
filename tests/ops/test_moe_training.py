"""The expert layer in training: only the wanted gradients, main_grads, autocast, checkpointing, tracing."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from expert_layer import POOL, Layer, biases, detached, double, layer, offsets
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sail_ops
from sail_ops import reference, testing
from sail_ops._autograd import Need
from sail_ops.testing import ExpertsCase

DTYPES = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
CASE = ExpertsCase(37, 48, 40, 5, 2, "dropped")
ops = torch.ops.sail_ops


def run(args: Layer, **kwargs) -> testing.Run:
    return testing.run(sail_ops.fused_experts, *args, **kwargs)


# ---- only what is wanted


def test_bits_of_needs_are_those_of_csrc() -> None:
    header = (Path(__file__).resolve().parents[2] / "csrc" / "torch" / "moe.h").read_text()
    (body,) = re.findall(r"enum Need \{(.*?)\};", header, re.S)
    bits = {
        re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper(): int(bit)
        for name, bit in re.findall(r"k(?:Need)?(\w+) = (\d+)", body)
    }
    assert bits == {need.name: need.value for need in Need}


@pytest.mark.parametrize("wanted", ["x", "gate_up", "down", "weights"])
def test_one_gradient_alone_has_the_same_bits(isa: str, wanted: str) -> None:
    args = layer(CASE, torch.bfloat16)
    frozen = Layer(*(t.detach().requires_grad_(name == wanted) for name, t in args._asdict().items()))
    name = f"args[{Layer._fields.index(wanted)}]"
    got = run(frozen).gradients
    assert list(got) == [name] and torch.equal(got[name], run(args).gradients[name])


def backward(args: Layer, needs: int, main: tuple[Tensor | None, ...] = (None, None, None)) -> tuple[Tensor, ...]:
    x, gate_up, down, ids, weights = detached(*args)
    bias = detached(*biases(CASE, x.dtype))
    h = ops.fused_experts(x, gate_up, None, down, ids, weights, *bias, 0, None, True)[1]
    return ops.fused_experts_backward(x, x, gate_up, None, down, ids, weights, h, *bias, 0, None, needs, *main)


def test_an_unwanted_gradient_is_neither_allocated_nor_computed() -> None:
    args = layer(CASE, torch.bfloat16)
    x, gate_up, down, _, weights = args
    first, second = biases(CASE, torch.bfloat16)
    everything = backward(args, 63)
    shapes = [t.shape for t in (x, gate_up, torch.empty(0), down, weights, first, second)]
    assert [t.shape for t in everything] == shapes
    for bit, output in enumerate((0, 1, 3, 4, 5, 6)):
        alone = backward(args, 1 << bit)
        assert torch.equal(alone[output], everything[output])
        assert all(t.numel() == 0 for i, t in enumerate(alone) if i != output)


def test_pre_activations_of_dropped_ids_are_not_read() -> None:
    x, gate_up, down, ids, weights = detached(*layer(CASE, torch.bfloat16))
    none = (None,) * 3
    h = ops.fused_experts(x, gate_up, None, down, ids, weights, None, None, 0, None, True)[1]
    rows = int(((ids >= 0) & (ids < CASE.E)).sum())
    assert rows < h.shape[0]
    results = []
    for rest in (0.0, torch.nan):
        h[rows:] = rest
        results.append(
            ops.fused_experts_backward(x, x, gate_up, None, down, ids, weights, h, None, None, 0, None, 63, *none)
        )
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


def test_nothing_is_saved_without_gradients() -> None:
    args = layer(CASE)
    with torch.no_grad():
        y = sail_ops.fused_experts(*args)
    assert not y.requires_grad and torch.equal(y, sail_ops.fused_experts(*args))


def saved_bytes(args: Layer, **kwargs) -> int:
    """Of what the call keeps for backward beside its arguments."""
    kept = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        sail_ops.fused_experts(*args, **kwargs)
    own = {t.untyped_storage().data_ptr() for t in args}
    return sum(size for p, size in kept.items() if p not in own)


def test_what_is_saved() -> None:
    args = layer(CASE, torch.bfloat16)
    assert saved_bytes(args) == CASE.T * 4 * CASE.F * CASE.K
    assert saved_bytes(args, recompute=True) == 0


# ---- gradients into buffers


@pytest.mark.parametrize("main_dtype", [torch.float32, None], ids=["fp32", "as_weights"])
@pytest.mark.parametrize("pair", [False, True], ids=["one", "pair"])
@DTYPES
def test_main_grads_are_added_to(isa: str, dtype: torch.dtype, pair: bool, main_dtype: torch.dtype | None) -> None:
    args = layer(CASE, dtype, pair=pair)
    weights = {"args[1][0]": args.gate_up[0], "args[1][1]": args.gate_up[1]} if pair else {"args[1]": args.gate_up}
    weights["args[2]"] = args.down
    old = {n: testing.random(*w.shape, dtype=main_dtype or dtype, seed=20) for n, w in weights.items()}
    buffers = {n: t.clone() for n, t in old.items()}
    got = run(args, main_grads=tuple(buffers.values()))
    want = testing.run(reference.fused_experts, *double(args), upstream=got.upstream).gradients
    base = testing.run(reference.fused_experts, *args, upstream=got.upstream).gradients
    for name, buffer in buffers.items():
        assert got.gradients[name] is None
        testing.assert_accurate(
            buffer, old[name] + want[name], old[name] + base[name].to(buffer.dtype), name=name, pool=POOL
        )


def test_main_grads_leave_the_gradients_of_the_leaves_empty() -> None:
    args = layer(CASE)
    buffers = torch.zeros_like(args.gate_up), torch.zeros_like(args.down)
    sail_ops.fused_experts(*args, main_grads=buffers).sum().backward()
    assert args.gate_up.grad is None and args.down.grad is None and args.x.grad is not None
    sail_ops.fused_experts(*args).sum().backward()
    assert torch.equal(buffers[0], args.gate_up.grad) and torch.equal(buffers[1], args.down.grad)


@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_main_grads_are_overwritten_on_demand(isa: str, main_dtype: torch.dtype) -> None:
    args = layer(ExpertsCase(6, 48, 40, 12, 1), torch.bfloat16)  # most experts without rows
    zeroed, dirty = ([torch.full_like(w, v, dtype=main_dtype) for w in args[1:3]] for v in (0.0, torch.nan))
    run(args, main_grads=tuple(zeroed))
    run(args, main_grads=tuple(dirty), accumulate=False)
    for a, b in zip(zeroed, dirty, strict=True):
        assert a.any() and torch.equal(a, b)


# ---- autocast, checkpointing, tracing


@pytest.mark.cpu_only
def test_autocast_gives_gradients_in_the_parameters_dtype() -> None:
    args, bias = layer(CASE), biases(CASE, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(args, biases=bias)
    narrow = Layer(*(t.to(torch.bfloat16) if i < 3 else t for i, t in enumerate(detached(*args))))
    want = sail_ops.fused_experts(*narrow, biases=tuple(b.detach().bfloat16() for b in bias))
    assert got.outputs[0].dtype == torch.bfloat16 and torch.equal(got.outputs[0], want)
    for g in got.gradients.values():
        assert g is not None and g.dtype == torch.float32 and g.any()


def test_activation_checkpointing() -> None:
    args = layer(CASE, torch.bfloat16)
    checkpointed = partial(checkpoint, sail_ops.fused_experts, use_reentrant=False)
    testing.assert_same(testing.run(checkpointed, *args), run(args))


def test_backward_is_once_differentiable() -> None:
    args = layer(CASE)
    (grad,) = torch.autograd.grad(sail_ops.fused_experts(*args).square().sum(), args.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("pair", [False, True], ids=["one", "pair"])
def test_tracing(pair: bool) -> None:
    args = layer(CASE, torch.bfloat16, pair=pair)
    testing.check_traceable(sail_ops.fused_experts, *args)

    def with_options(x, gate_up, down, ids, weights, *biases):
        return sail_ops.fused_experts(x, gate_up, down, ids, weights, biases=biases, activation="gelu", recompute=True)

    testing.check_traceable(with_options, *args, *biases(CASE, torch.bfloat16))


SORTED = offsets(3, 0, 9, 20, 5)


def test_tracing_of_sorted_rows() -> None:
    x, gate_up, down, _, _ = layer(CASE, torch.bfloat16)
    testing.check_traceable(sail_ops.grouped_experts, x, gate_up, down, SORTED)
    testing.check_traceable(sail_ops.grouped_mm, x, gate_up.detach().transpose(1, 2).requires_grad_(), SORTED)


@pytest.mark.parametrize("op", ["fused_experts", "grouped_experts"])
@pytest.mark.parametrize("main", [False, True], ids=["returned", "added"])
def test_opcheck_of_the_expert_layer(op: str, main: bool) -> None:
    x, gate_up, down, ids, weights = detached(*layer(CASE._replace(routing="uniform"), torch.bfloat16))
    where, scale = (ids, weights) if op == "fused_experts" else (SORTED, weights[:, 0].contiguous())
    forward, backward = getattr(ops, op).default, getattr(ops, op + "_backward").default
    bias = detached(*biases(CASE, torch.bfloat16))
    args = (x, gate_up, None, down, where, scale, *bias, 0, 2.0)
    torch.library.opcheck(forward, (*args, True))
    h = forward(*args, True)[1]
    buffers = (torch.zeros_like(gate_up), None, torch.zeros_like(down)) if main else (None, None, None)
    for needs in (63, 6):
        torch.library.opcheck(backward, (x, x, gate_up, None, down, where, scale, h, *bias, 0, 2.0, needs, *buffers))


def test_opcheck_of_grouped_mm() -> None:
    x, gate_up, _, _, _ = detached(*layer(CASE, torch.bfloat16))
    for w in (gate_up.transpose(1, 2), gate_up.transpose(1, 2).contiguous()):
        torch.library.opcheck(ops.grouped_mm.default, (x, w, SORTED))
        dy = ops.grouped_mm(x, w, SORTED)
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(ops.grouped_mm_backward.default, (dy, x, w, SORTED, *needs))


def test_reference_gradients() -> None:
    x, gate_up, down, ids, weights = double(layer(ExpertsCase(4, 3, 2, 3, 2, "dropped")))
    case = ExpertsCase(4, 3, 2, 3, 2)
    for activation in reference.ACTIVATIONS:
        fn = partial(reference.fused_experts, activation=activation, clamp=3.0)
        bias = double(biases(case, torch.float32))
        assert torch.autograd.gradcheck(
            lambda x, g, d, w, *b, fn=fn: fn(x, g, d, ids, w, biases=b), (x, gate_up, down, weights, *bias)
        )
    ends = offsets(1, 0, 2)
    assert torch.autograd.gradcheck(
        lambda x, g, d, w: reference.grouped_experts(x, g, d, ends, w), (x, gate_up, down, weights[:, 0])
    )
    assert torch.autograd.gradcheck(lambda x, w: reference.grouped_mm(x, w, ends), (x, gate_up.transpose(1, 2)))
