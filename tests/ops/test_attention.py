"""attention and attention_varlen: accuracy of outputs and gradients, packs, edges, tracing, errors."""

import math
from collections.abc import Callable

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

import sail_ops
from sail_ops import reference, testing
from sail_ops.testing import AttentionCase

DTYPES = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
# where one dtype is enough, and where a wide and a narrow one are: the CUDA kernels have no fp32
DTYPE, *BOTH = (torch.float32, torch.float32, torch.bfloat16) if DEVICE == "cpu" else (torch.bfloat16,) * 2
CASES = pytest.mark.parametrize("case", testing.ATTENTION_CASES.values(), ids=testing.ATTENTION_CASES.keys())
# Rows of out and dq share the error of few keys' probabilities, rows of dk and dv those of few queries'.
POOL = {"outputs[0]": 64, "args[0]": 256, "args[1]": 1024, "args[2]": 1024}
# sequences of a pack: (queries, keys)
PACKS = {
    "ragged": [(37, 37), (0, 0), (1, 1), (133, 133), (3, 3), (64, 64), (0, 0)],
    "more_keys": [(5, 600), (40, 70), (1, 9), (0, 12), (130, 131)],
}


def inputs(case: AttentionCase, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v."""
    B, S, L, H, G, A, _ = case
    shapes = (B, S, H, A), (B, L, G, A), (B, L, G, A)
    q, k, v = (testing.random(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    return q, k, v


def offsets(lengths: list[int]) -> Tensor:
    """cu_seqlens."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def packed(pack: list[tuple[int, int]], dtype: torch.dtype, H: int = 4, G: int = 2, A: int = 72) -> tuple:
    """Arguments of attention_varlen."""
    lengths_q, lengths_k = [nq for nq, _ in pack], [nk for _, nk in pack]
    shapes = (sum(lengths_q), H, A), (sum(lengths_k), G, A), (sum(lengths_k), G, A)
    q, k, v = (testing.random(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    return q, k, v, offsets(lengths_q), offsets(lengths_k), max(lengths_q), max(lengths_k)


@CASES
@DTYPES
def test_accuracy(isa: str, dtype: torch.dtype, case: AttentionCase) -> None:
    args = inputs(case, dtype)
    kwargs = {"causal": case.causal, "return_lse": True}
    testing.check_op(sail_ops.attention, reference.attention, *args, pool=POOL, **kwargs)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())
@DTYPES
def test_pack_accuracy(isa: str, dtype: torch.dtype, pack: list[tuple[int, int]], causal: bool) -> None:
    args = packed(pack, dtype)
    kwargs = {"causal": causal, "return_lse": True}
    testing.check_op(sail_ops.attention_varlen, reference.attention_varlen, *args, pool=POOL, **kwargs)


def test_keys_on_both_sides_of_the_most_whose_scores_are_kept(isa: str) -> None:
    args = inputs(AttentionCase(1, 67, 4100, 2, 1, 8, causal=True), DTYPE)  # on the CPU 4,096, of a block of rows
    testing.check_op(sail_ops.attention, reference.attention, *args, pool=POOL, causal=True, return_lse=True)


@pytest.mark.parametrize("scale", [0.02, 1.0, -0.3, 0.0])
def test_softmax_scale(isa: str, scale: float) -> None:
    for dtype in BOTH:
        args = inputs(AttentionCase(2, 70, 70, 2, 1, 64), dtype)
        testing.check_op(sail_ops.attention, reference.attention, *args, pool=POOL, softmax_scale=scale)
    with pytest.raises(AssertionError, match="budget"):
        testing.check_op(lambda *a: sail_ops.attention(*a, softmax_scale=scale), reference.attention, *args, pool=POOL)


def test_default_scale_and_mask() -> None:
    q, k, v = inputs(AttentionCase(1, 9, 9, 2, 1, 64), DTYPE)
    assert torch.equal(sail_ops.attention(q, k, v), sail_ops.attention(q, k, v, softmax_scale=0.125, causal=False))


@DTYPES
def test_large_scores(isa: str, dtype: torch.dtype) -> None:
    q, k, v = (t.detach() for t in inputs(AttentionCase(1, 130, 300, 2, 1, 64), dtype))
    q, k = q * 8, k.sort(1).values * 8  # maxima rise from block to block
    assert reference.attention(q, k, v, return_lse=True)[1].max() > 400
    # in fp32 the gradients would show the rounding of lse, which eager attention does not save
    q, k, v = (t.requires_grad_(dtype != torch.float32) for t in (q, k, v))
    testing.check_op(sail_ops.attention, reference.attention, q, k, v, pool=POOL, return_lse=True)


@pytest.mark.parametrize("S, L", [(50, 20), (3, 0), (150, 70), (7, 3)])
@DTYPES
def test_rows_that_see_no_key(isa: str, dtype: torch.dtype, S: int, L: int) -> None:
    q, k, v = inputs(AttentionCase(8, S, L, 4, 2, 64), dtype)
    out, lse = sail_ops.attention(q, k, v, causal=True, return_lse=True)
    none = S - L
    assert not out[:, :none].any() and (lse[..., :none] == -math.inf).all() and lse[..., none:].isfinite().all()
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    assert not dq[:, :none].any()
    # the others are attention of their own
    rest = q.detach()[:, none:].requires_grad_()
    want = sail_ops.attention(rest, k, v, causal=True, return_lse=True)
    assert torch.equal(out[:, none:], want[0]) and torch.equal(lse[..., none:], want[1])
    if L:
        testing.check_op(lambda *a: sail_ops.attention(*a, causal=True), _causal, q, k, v, pool=POOL)
    else:
        assert dk.shape == k.shape and dv.shape == v.shape


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.attention(q, k, v, causal=True)


@pytest.mark.parametrize("B, S, L", [(0, 5, 5), (2, 0, 5), (2, 0, 0), (2, 5, 0)])
def test_nothing_to_do(B: int, S: int, L: int) -> None:
    q, k, v = inputs(AttentionCase(B, S, L, 4, 2, 64), DTYPE)
    out, lse = sail_ops.attention(q, k, v, return_lse=True)
    assert out.shape == q.shape and lse.shape == (B, 4, S) and not out.any()
    for grad, leaf in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert grad.shape == leaf.shape and not grad.any()


def test_a_pack_is_its_sequences(isa: str) -> None:
    for pack in PACKS.values():
        q, k, v, cu_q, cu_k, *longest = packed(pack, torch.bfloat16)
        out, lse = sail_ops.attention_varlen(q, k, v, cu_q, cu_k, *longest, causal=True, return_lse=True)
        for i, (nq, nk) in enumerate(pack):
            of_q, of_k = (slice(cu[i], cu[i + 1]) for cu in (cu_q, cu_k))
            lone = offsets([nq]), offsets([nk]), *longest
            alone = sail_ops.attention_varlen(q[of_q], k[of_k], v[of_k], *lone, causal=True, return_lse=True)
            assert torch.equal(out[of_q], alone[0]) and torch.equal(lse[:, of_q], alone[1])
            if DEVICE != "cpu" and nq <= 8:  # a card splits the keys of few queries, which is another sum
                continue
            alone = sail_ops.attention(q[None, of_q], k[None, of_k], v[None, of_k], causal=True, return_lse=True)
            assert torch.equal(out[of_q], alone[0][0]) and torch.equal(lse[:, of_q], alone[1][0])


def test_neighbors_do_not_leak(isa: str) -> None:
    pack = [(37, 37), (3, 3), (61, 61)]
    q, k, v, *rest = packed(pack, DTYPE)
    clean = testing.run(sail_ops.attention_varlen, q, k, v, *rest, causal=True)
    with torch.no_grad():
        for t in (q, k, v):
            t[37:40] = math.nan
    dirty = testing.run(sail_ops.attention_varlen, q, k, v, *rest, causal=True)
    pairs = [(clean.outputs[0], dirty.outputs[0]), *((g, dirty.gradients[n]) for n, g in clean.gradients.items())]
    for a, b in pairs:
        assert torch.equal(a[:37], b[:37]) and torch.equal(a[40:], b[40:]) and b[37:40].isnan().all()


def test_keys_to_come_do_not_leak(isa: str) -> None:
    q, k, v = (t.detach() for t in inputs(AttentionCase(1, 300, 300, 2, 1, 64), torch.bfloat16))
    clean = sail_ops.attention(q, k, v, causal=True)
    k[:, 250:], v[:, 250:] = 1e4, -1e4
    assert torch.equal(sail_ops.attention(q, k, v, causal=True)[:, :250], clean[:, :250])


@CASES
def test_same_bits_after_another_call_left_nan_behind(isa: str, case: AttentionCase) -> None:
    for dtype in BOTH:
        args = inputs(case, dtype)
        clean = testing.run(sail_ops.attention, *args, causal=case.causal)
        poison = [torch.full_like(t, math.nan).requires_grad_() for t in args]
        testing.run(sail_ops.attention, *poison, causal=case.causal)
        testing.assert_same(testing.run(sail_ops.attention, *args, causal=case.causal), clean)


VIEWS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "fused_projection": lambda q, k, v: torch.cat([q, *(t[:, : q.shape[1]] for t in (k, v))], 2).split([4, 2, 2], 2),
    "heads_first": lambda *t: tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in t),
    "cache_slice": lambda *t: tuple(torch.cat([x, x], 1)[:, : x.shape[1]] for x in t),
    "every_second_column_block": lambda *t: tuple(torch.cat([x, x], 3)[..., : x.shape[3]] for x in t),
    "one_key_for_all": lambda q, k, v: (q, k[:, :1].expand_as(k), v[:, :1].expand_as(v)),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("S", [2, 70])
def test_views_are_read_in_place(isa: str, S: int, view: Callable[..., tuple[Tensor, ...]]) -> None:
    for dtype in BOTH:
        args = view(*(t.detach() for t in inputs(AttentionCase(2, S, 70, 4, 2, 80), dtype)))
        dense = [t.contiguous().requires_grad_() for t in args]
        strided = [t.detach().requires_grad_() for t in args]
        got, want = (testing.run(sail_ops.attention, *t, causal=True) for t in (strided, dense))
        assert got.outputs[0].is_contiguous()
        if DEVICE == "cuda":  # strides decide whether Hopper's copies take a tensor: another kernel has other bits
            # of keys that are all one dq is nothing but rounding
            leaves = [t.detach() for t in args] if view is VIEWS["one_key_for_all"] else strided
            testing.check_op(sail_ops.attention, reference.attention, *leaves, causal=True, pool=POOL)
        else:
            testing.assert_same(got, want)


@pytest.mark.parametrize("which", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_only_wanted_gradients(which: tuple[int, ...]) -> None:
    args = inputs(AttentionCase(2, 33, 33, 4, 2, 64), DTYPE)
    args = [t.detach().requires_grad_(bool(w)) for t, w in zip(args, which, strict=True)]
    testing.check_op(sail_ops.attention, reference.attention, *args, pool=POOL)


@pytest.mark.parametrize("used", [0, 1], ids=["out", "lse"])
def test_one_of_two_outputs_used(used: int) -> None:
    args = inputs(AttentionCase(2, 33, 33, 4, 2, 64), DTYPE)

    def one(fn: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
        return lambda *a: fn(*a, causal=True, return_lse=True)[used]

    testing.check_op(one(sail_ops.attention), one(reference.attention), *args, pool=POOL)


def test_same_bits_every_time_and_for_any_number_of_threads(isa: str) -> None:
    many, pack = inputs(AttentionCase(1, 300, 300, 4, 1, 64), torch.bfloat16), packed(PACKS["ragged"], DTYPE)
    testing.check_repeatable(sail_ops.attention, *many, causal=True, times=3 if DEVICE == "emulated" else 20)
    first = testing.run(sail_ops.attention, *many, causal=True), testing.run(sail_ops.attention_varlen, *pack)
    before = torch.get_num_threads()
    try:
        for n in (1, 3, 5):
            torch.set_num_threads(n)
            testing.assert_same(testing.run(sail_ops.attention, *many, causal=True), first[0])
            testing.assert_same(testing.run(sail_ops.attention_varlen, *pack), first[1])
    finally:
        torch.set_num_threads(before)


def test_nan_stays_in_its_row(isa: str) -> None:
    for S in (2, 40):
        q, k, v = (t.detach() for t in inputs(AttentionCase(1, S, 40, 2, 1, 64), DTYPE))
        q[0, 1, 0, 3] = math.nan
        out = sail_ops.attention(q, k, v)
        assert out[0, 1, 0].isnan().all() and int(out.isnan().sum()) == 64


def test_tracing() -> None:
    testing.check_traceable(sail_ops.attention, *inputs(AttentionCase(1, 9, 12, 4, 2, 64), torch.bfloat16), causal=True)
    testing.check_traceable(
        sail_ops.attention, *inputs(AttentionCase(1, 9, 12, 4, 2, 64), torch.bfloat16), return_lse=True
    )
    testing.check_traceable(sail_ops.attention_varlen, *packed(PACKS["ragged"], torch.bfloat16), causal=True)


def test_dynamic_shapes() -> None:
    compiled = torch.compile(sail_ops.attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for S in (5, 9, 33):
        args = inputs(AttentionCase(2, S, S, 4, 2, 64), DTYPE)
        testing.assert_same(testing.run(compiled, *args), testing.run(sail_ops.attention, *args))


def test_opcheck() -> None:
    ops = torch.ops.sail_ops
    q, k, v = (t.detach() for t in inputs(AttentionCase(1, 5, 7, 4, 2, 64), DTYPE))
    out, lse = ops.attention(q, k, v, 0.1, True)
    torch.library.opcheck(ops.attention.default, (q, k, v, 0.1, True))
    for dlse in (None, lse):
        torch.library.opcheck(ops.attention_backward.default, (q, dlse, q, k, v, out, lse, 0.1, True))
    args = [t.detach() if isinstance(t, Tensor) else t for t in packed(PACKS["more_keys"], DTYPE)]
    out, lse = ops.attention_varlen(*args, 0.1, False)
    torch.library.opcheck(ops.attention_varlen.default, (*args, 0.1, False))
    torch.library.opcheck(ops.attention_varlen_backward.default, (out, lse, *args[:3], out, lse, *args[3:], 0.1, False))


def test_reference_is_scaled_dot_product_attention() -> None:
    q, k, v = (t.double() for t in inputs(AttentionCase(2, 9, 9, 4, 2, 8), torch.float32))
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    for causal in (False, True):
        want = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True)
        torch.testing.assert_close(reference.attention(q, k, v, causal=causal), want.transpose(1, 2))


def test_reference_gradients() -> None:
    q, k, v = (t.detach().double().requires_grad_() for t in inputs(AttentionCase(1, 4, 3, 2, 1, 3), torch.float32))
    assert torch.autograd.gradcheck(_causal, (q, k, v))


def test_autocast_casts_all_three() -> None:
    q, k, v = inputs(AttentionCase(1, 9, 9, 4, 2, 64), torch.float32)
    with torch.autocast(q.device.type, torch.bfloat16):
        out = sail_ops.attention(q, k.bfloat16(), v)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32


def test_activation_checkpointing() -> None:
    args = inputs(AttentionCase(1, 33, 33, 4, 2, 64), DTYPE)

    def checkpointed(*t: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(sail_ops.attention, *t, use_reentrant=False)

    testing.assert_same(testing.run(checkpointed, *args), testing.run(sail_ops.attention, *args))


def test_backward_is_once_differentiable() -> None:
    q, k, v = inputs(AttentionCase(1, 3, 3, 2, 1, 64), DTYPE)
    (grad,) = torch.autograd.grad(sail_ops.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


Q, K = torch.ones(2, 5, 4, 64, dtype=DTYPE), torch.ones(2, 7, 2, 64, dtype=DTYPE)
QT, KT, CU = torch.ones(5, 4, 64, dtype=DTYPE), torch.ones(5, 2, 64, dtype=DTYPE), torch.tensor([0, 2, 5]).int()


def varlen(q=QT, k=KT, v=KT, cu_q=CU, cu_k=CU, max_q=3, max_k=3) -> None:
    sail_ops.attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


ERRORS = {
    "rank": (lambda: sail_ops.attention(Q[0], K, K), r"attention: q: got shape \[5, 4, 64\], expected 4 dimensions"),
    "k_rank": (lambda: sail_ops.attention(Q, K[0], K), r"k: got shape \[7, 2, 64\], expected 4 dimensions"),
    "dtype": (lambda: sail_ops.attention(Q.double(), K, K), "q: got .*, expected float32, bfloat16 or float16"),
    "v_dtype": (lambda: sail_ops.attention(Q, K, K.half()), f"v: got float16, expected {str(DTYPE)[6:]}"),
    "heads": (lambda: sail_ops.attention(Q[:, :, :3], K, K), "q: got 3 heads, expected a multiple of k's 2"),
    "no_heads": (lambda: sail_ops.attention(Q, K[:, :, :0], K[:, :, :0]), "k: got heads = 0"),
    "no_query_heads": (lambda: sail_ops.attention(Q[:, :, :0], K, K), "q: got 0 heads"),
    "head_dim": (lambda: sail_ops.attention(Q, K[..., :63], K), r"k: got .*, expected a head dim of 64"),
    "no_head_dim": (lambda: sail_ops.attention(Q[..., :0], K[..., :0], K[..., :0]), "q: got a head dim of 0"),
    "wide": (lambda: sail_ops.attention(*[torch.ones(1, 1, 1, 257)] * 3), "head dim of 257, expected 1 to 256"),
    "batch": (lambda: sail_ops.attention(Q, K[:1], K[:1]), r"k: got shape .*, expected a batch of 2"),
    "v_shape": (lambda: sail_ops.attention(Q, K, K[:, :6]), r"v: got shape .*, expected k's shape"),
    "strides": (
        lambda: sail_ops.attention(Q[..., ::2], K[..., ::2], K[..., ::2]),
        "q: got stride.* 2, expected contig",
    ),
    "v_strides": (
        lambda: sail_ops.attention(Q, K, K.mT.contiguous().mT),
        "v: got stride.* 2, expected contiguous rows",
    ),
    "scale": (lambda: sail_ops.attention(Q, K, K, softmax_scale=math.nan), "softmax_scale: got nan"),
    "varlen_rank": (lambda: varlen(q=Q), "attention_varlen: q: got shape .*, expected 3 dimensions"),
    "int64": (lambda: varlen(cu_q=CU.long()), "cu_seqlens_q: got int64, expected int32"),
    "cu_rank": (lambda: varlen(cu_k=CU[None]), r"cu_seqlens_k: got shape \[1, 3\], expected 1 dimensions"),
    "cu_empty": (lambda: varlen(cu_q=CU[:0]), "cu_seqlens_q: got no element"),
    "first": (lambda: varlen(cu_q=ints(1, 2, 5)), "cu_seqlens_q: got first element 1, expected 0"),
    "falling": (
        lambda: varlen(cu_q=ints(0, 6, 5), max_q=6),
        "cu_seqlens_q: got 5 after 6, expected",
    ),
    "end": (lambda: varlen(cu_q=ints(0, 2, 4)), "cu_seqlens_q: got last element 4, expected 5"),
    "past_the_end": (lambda: varlen(cu_k=ints(0, 2, 6), max_k=9), "cu_seqlens_k: got last element 6, expected 5"),
    "count": (lambda: varlen(cu_k=ints(0, 1, 2, 5)), r"cu_seqlens_k: got \[4\], expected \[3\], as cu_seqlens_q"),
    "max_q": (lambda: varlen(max_q=2), "cu_seqlens_q: got a sequence of 3, expected at most max_seqlen = 2"),
    "max_k": (lambda: varlen(max_k=2), "cu_seqlens_k: got a sequence of 3, expected at most max_seqlen = 2"),
    "cu_strides": (lambda: varlen(cu_q=ints(0, 9, 2, 9, 5)[::2]), "cu_seqlens_q: got a non-contiguous"),
}


@pytest.mark.parametrize("call, message", ERRORS.values(), ids=ERRORS.keys())
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_gradients() -> None:
    q, k, v = (t.detach() for t in inputs(AttentionCase(1, 5, 7, 4, 2, 64), DTYPE))
    backward = torch.ops.sail_ops.attention_backward
    out, lse = torch.ops.sail_ops.attention(q, k, v, 0.1, True)
    for args, message in [
        ((q[:, :4], None, q, k, v, out, lse), "attention_backward: dout: got shape"),
        ((q.mT.contiguous().mT, None, q, k, v, out, lse), "dout: got a non-contiguous"),
        ((q, None, q, k, v, out.half(), lse), "out: got float16"),
        ((q, None, q, k, v, out, lse[:, :3]), "lse: got shape"),
        ((q, lse.half(), q, k, v, out, lse), "dlse: got float16"),
    ]:
        with pytest.raises(ValueError, match=message):
            backward(*args, 0.1, True)
