"""Calls an emulated grouped GEMM (csrc/cuda/kernels/grouped_gemm.h) with tensors, for the tests of each architecture.

Operands lie between NaNs, results between NaNs that must stay: a read or write past an end shows.
R rows, E experts, D hidden, F expert width.
"""

import math
from typing import Any, NamedTuple

import emulated
import internals
import torch
from torch import Tensor

from sail_ops import reference, testing

PAD = 64
DTYPES = (torch.bfloat16, torch.float16)
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "f16"}


class How(NamedTuple):
    """How a problem is launched: tile shape, order of threads, number of blocks; on sm_90a in clusters of two."""

    tiles: str = "large"
    seed: int = 0
    blocks: int = 3
    paired: bool = False

    def native(self, dtype: torch.dtype) -> Any:
        tiles = getattr(internals.Tiles, self.tiles)
        return internals.How(**self._asdict() | {"tiles": tiles, "dtype": getattr(internals.Element, ELEMENTS[dtype])})


class Problem(NamedTuple):
    """Rows per expert, columns and depth of the products; what is odd about them."""

    counts: tuple[int, ...]
    N: int
    K: int
    gather: bool = False
    tail: int = 0  # rows past the last expert's
    shift: int = 0  # elements by which operands miss the alignment
    pitch: int = 0  # elements between a row's end and the next
    expert_stride: int = 0  # elements between the experts' weights; 0: none are between

    @property
    def E(self) -> int:
        return len(self.counts)

    @property
    def rows(self) -> int:
        return sum(self.counts)

    @property
    def R(self) -> int:
        return self.rows + self.tail

    def offsets(self) -> Tensor:
        return torch.tensor([0, *self.counts]).cumsum(0).int()


PROBLEMS = {
    "even": Problem((128, 64), 128, 64),
    "tails": Problem((70, 0, 133, 1), 136, 72),
    "deep": Problem((17, 40), 264, 200),
    "hot": Problem((0, 0, 150, 0), 64, 40),
    "gathered": Problem((5, 130, 0, 30), 72, 96, gather=True),
    "tail_rows": Problem((20, 3), 80, 32, tail=140),
    "pitch": Problem((33, 9), 72, 48, pitch=8),
    "narrow": Problem((30, 12), 40, 20, pitch=4),
    "odd": Problem((9, 0, 70), 77, 45, gather=True),
    "shifted": Problem((40, 11), 64, 64, shift=1),
    "tiny": Problem((1, 2), 3, 1),
    "no_rows": Problem((0, 0), 64, 64, tail=5),
    "many_experts": Problem(tuple(i % 3 for i in range(70)), 40, 24),
}


class Memory:
    """Tensors between NaNs. `check` after a launch: nothing was written outside of the results."""

    def __init__(self) -> None:
        self.results: list[tuple[Tensor, Tensor]] = []

    def operand(self, value: Tensor, shift: int = 0, pitch: int = 0) -> Tensor:
        """A copy whose rows are `pitch` elements apart, between NaNs, and `shift` elements off the alignment."""
        width = value.shape[-1] + pitch
        around = torch.full((2 * PAD + shift + value.numel() // max(value.shape[-1], 1) * width,), math.nan).to(
            value.dtype
        )
        view = around[PAD + shift : around.numel() - PAD].view(*value.shape[:-1], width)[..., : value.shape[-1]]
        view.copy_(value)
        return view

    def result(self, *shape: int, dtype: torch.dtype, value: Tensor | None = None) -> Tensor:
        around = torch.full((2 * PAD + math.prod(shape),), math.nan).to(dtype)
        view = around[PAD : around.numel() - PAD].view(shape)
        if value is not None:
            view.copy_(value)
        self.results.append((around, view))
        return view

    def check(self) -> None:
        for around, view in self.results:
            assert around[:PAD].isnan().all() and around[PAD + view.numel() :].isnan().all(), "written out of bounds"


def random_rows(
    memory: Memory, p: Problem, width: int, dtype: torch.dtype, gather: bool, seed: int = 0
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A matrix, the index of its rows, and the rows that the index names. Rows past the last expert's are NaN."""
    if not gather:
        value = testing.random(p.R, width, dtype=dtype, seed=seed)
        value[p.rows :] = math.nan
        held = memory.operand(value, p.shift, p.pitch)
        return held, None, value[: p.rows]
    tokens = max(p.rows // 2, 1)
    value = testing.random(tokens, width, dtype=dtype, seed=seed)
    index = torch.randint(tokens, (p.R,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    index[p.rows :] = 2**31 - 1
    return memory.operand(value, p.shift, p.pitch), index, value[index[: p.rows].long()]


def weights(memory: Memory, p: Problem, dtype: torch.dtype, layout: str, halves: bool = False) -> tuple[Tensor, Tensor]:
    """B in memory as `layout` has it, and as [E, N, K] (halves: [E, 2 N, K])."""
    N = 2 * p.N if halves else p.N
    value = testing.random(p.E, N, p.K, dtype=dtype, scale=p.K**-0.5, seed=1)
    held = memory.operand(value if layout == "nk" else value.mT.contiguous(), p.shift, p.pitch)
    return _apart(held, p.expert_stride) if p.expert_stride else held, value


def _apart(t: Tensor, stride: int) -> Tensor:
    """The same experts `stride` elements from each other; what lies between is never touched, so it takes no memory."""
    width = t.shape[1] * t.shape[2]
    out = torch.empty((t.shape[0] - 1) * stride + width, dtype=t.dtype).as_strided(t.shape, (stride, t.shape[2], 1))
    return out.copy_(t)


class RowsCall(NamedTuple):
    """How, a RowsProblem, and the operands as the reference takes them."""

    how: Any
    problem: Any
    a: Tensor  # [rows, K]
    b: Tensor  # [E, N or 2 N, K]


def rows_call(
    memory: Memory,
    p: Problem,
    dtype: torch.dtype,
    how: How,
    layout: str,
    *,
    halves: bool = False,
    zero_tail: bool = False,
    two_parts: bool = False,
) -> RowsCall:
    held, index, a = random_rows(memory, p, p.K, dtype, p.gather)
    b_held, b = weights(memory, p, dtype, layout, halves)
    row, expert = b_held.stride(1), b_held.stride(0)
    rows_of_b = b_held.shape[1]
    split = p.N if halves else rows_of_b
    first, second = b_held, None
    if halves:
        second = b_held[:, p.N :]
    elif two_parts:
        split = rows_of_b // 3
        first, second = (
            memory.operand(b_held[:, s].clone(), p.shift, p.pitch) for s in (slice(split), slice(split, None))
        )
        pair = memory.operand(torch.stack([_padded(t, rows_of_b) for t in (first, second)]), p.shift, p.pitch)
        first, second, expert = pair[0], pair[1], pair.stride(1)
    problem = internals.RowsProblem(
        a=internals.Rows(data=held, stride=held.stride(0), index=index),
        b=internals.Stacked(first=first, second=second, expert_stride=expert, row_stride=row, split=split),
        layout=getattr(internals.Layout, layout),
        offsets=p.offsets(),
        R=p.R,
        E=p.E,
        N=p.N,
        K=p.K,
        zero_tail=zero_tail,
    )
    return RowsCall(how.native(dtype), problem, a, b)


def _padded(t: Tensor, rows: int) -> Tensor:
    """[E, rows, ..] with NaN after t's rows."""
    out = torch.full((t.shape[0], rows, t.shape[2]), math.nan, dtype=t.dtype)
    out[:, : t.shape[1]] = t
    return out


def by_expert(p: Problem, a: Tensor, b: Tensor) -> Tensor:
    """a[r] @ b[e].T, the rows of each expert with its matrix."""
    parts = a.split(list(p.counts))
    return torch.cat([rows @ b[e].mT for e, rows in enumerate(parts)])


def expert_of_row(p: Problem) -> Tensor:
    return torch.repeat_interleave(torch.arange(p.E), torch.tensor(p.counts))


def store_rows(
    library: emulated.Library,
    p: Problem,
    dtype: torch.dtype,
    how: How,
    layout: str = "nk",
    *,
    bias: bool = False,
    weight: bool = False,
    two_parts: bool = False,
) -> Tensor:
    """Checks C = A B^T (+ bias) (* weight), tail rows zero, and returns it."""
    memory = Memory()
    call = rows_call(memory, p, dtype, how, layout, zero_tail=p.tail > 0, two_parts=two_parts)
    bias_EN = memory.operand(testing.random(p.E, p.N, dtype=dtype, seed=2)) if bias else None
    weight_R = memory.operand(testing.random(p.R, seed=3).sigmoid()) if weight else None
    out = memory.result(p.R, p.N, dtype=dtype)
    to = internals.StoreRows(out=out, out_stride=p.N, bias=bias_EN, weight=weight_R)
    library.store_rows(call.how, call.problem, to)
    memory.check()

    def eager(a: Tensor, b: Tensor, like: torch.dtype) -> Tensor:
        c = by_expert(p, a, b)
        if bias_EN is not None:
            c = c + bias_EN.to(like)[expert_of_row(p)]
        if weight_R is not None:
            c = c * weight_R[: p.rows, None].to(like)
        return c

    ref = eager(call.a.double(), call.b.double(), torch.float64)
    testing.assert_accurate(out[: p.rows], ref, eager(call.a, call.b, dtype), pool=64)
    assert (out[p.rows :] == 0).all(), "tail rows"
    return out.clone()


def gated_forward(
    library: emulated.Library,
    p: Problem,
    dtype: torch.dtype,
    how: How,
    *,
    activation: str = "silu",
    clamp: float | None = None,
    bias: bool = False,
    want: str = "ha",
) -> Tensor:
    """Checks h and a, those of them that are wanted, and returns them side by side."""
    memory = Memory()
    call = rows_call(memory, p, dtype, how, "nk", halves=True)
    bias_E2F = memory.operand(testing.random(p.E, 2 * p.N, dtype=dtype, seed=2)) if bias else None
    h = memory.result(p.R, 2 * p.N, dtype=dtype) if "h" in want else None
    a = memory.result(p.R, p.N, dtype=dtype) if "a" in want else None
    limit = math.inf if clamp is None else clamp
    to = internals.GatedForward(
        bias=bias_E2F, h=h, a=a, activation=getattr(internals.Activation, activation), clamp=limit
    )
    library.gated_forward(call.how, call.problem, to)
    memory.check()

    def eager(x: Tensor, b: Tensor, like: torch.dtype) -> tuple[Tensor, Tensor]:
        c = by_expert(p, x, b)
        if bias_E2F is not None:
            c = c + bias_E2F.to(like)[expert_of_row(p)]
        return c, reference.gated_activation(*c.chunk(2, -1), activation, clamp)

    refs = eager(call.a.double(), call.b.double(), torch.float64)
    bases = eager(call.a, call.b, dtype)
    outs = []
    for out, ref, base, name in zip((h, a), refs, bases, ("h", "a"), strict=True):
        if out is not None:
            testing.assert_accurate(out[: p.rows], ref, base, name=name, pool=64)
            assert out[p.rows :].isnan().all(), "rows of no expert were written"
            outs.append(out[: p.rows])
    return torch.cat(outs, -1)


def gated_backward(
    library: emulated.Library,
    p: Problem,
    dtype: torch.dtype,
    how: How,
    *,
    activation: str = "silu",
    clamp: float | None = None,
    weight: bool = True,
) -> Tensor:
    """Checks dh, weight * a and the sums for the routing weights' gradient; returns all side by side."""
    memory = Memory()
    call = rows_call(memory, p, dtype, how, "kn")
    h = memory.operand(testing.random(p.R, 2 * p.N, dtype=dtype, seed=4))
    weight_R = memory.operand(testing.random(p.R, seed=3).sigmoid()) if weight else None
    dh = memory.result(p.R, 2 * p.N, dtype=dtype)
    a_weighted = memory.result(p.R, p.N, dtype=dtype)
    dot = memory.result(-(-p.N // 64), p.R, dtype=torch.float32)
    to = internals.GatedBackward(
        h=h,
        weight=weight_R,
        dh=dh,
        a_weighted=a_weighted,
        dot=dot,
        activation=getattr(internals.Activation, activation),
        clamp=math.inf if clamp is None else clamp,
    )
    library.gated_backward(call.how, call.problem, to)
    memory.check()

    def eager(dy: Tensor, down: Tensor, like: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        pre = h[: p.rows].to(like).requires_grad_()
        w = torch.ones(p.rows, dtype=like) if weight_R is None else weight_R[: p.rows].to(like)
        a = reference.gated_activation(*pre.chunk(2, -1), activation, clamp)
        da = by_expert(p, dy, down)
        (grad,) = torch.autograd.grad(a, pre, da * w[:, None])
        wide = torch.float32 if like != torch.float64 else like
        return grad, (a * w[:, None]).detach(), (da * a).detach().to(wide).sum(-1)

    refs, bases = eager(call.a.double(), call.b.double(), torch.float64), eager(call.a, call.b, dtype)
    outs = dh[: p.rows], a_weighted[: p.rows], dot[:, : p.rows].sum(0)
    for out, ref, base, name in zip(outs, refs, bases, ("dh", "a_weighted", "dot"), strict=True):
        testing.assert_accurate(out, ref, base, name=name, pool=64)
    assert dh[p.rows :].isnan().all() and dot[:, p.rows :].isnan().all(), "rows of no expert were written"
    return torch.cat([outs[0].float(), outs[1].float(), outs[2][:, None]], -1)


def wgrad(
    library: emulated.Library,
    p: Problem,
    dtype: torch.dtype,
    how: How,
    *,
    fp32: bool = False,
    accumulate: bool = False,
    two_parts: bool = False,
    gather: tuple[bool, bool] = (False, True),
) -> Tensor:
    """Checks dW[e] (+)= A_e^T B_e with A [R, p.N] and B [R, p.K], and returns it."""
    memory = Memory()
    held_a, index_a, a = random_rows(memory, p, p.N, dtype, gather[0], 5)
    held_b, index_b, b = random_rows(memory, p, p.K, dtype, gather[1], 6)
    kind = torch.float32 if fp32 else dtype
    split = p.N // 3 if two_parts else p.N
    shape = (2, p.E, p.N, p.K)
    before = testing.random(*shape, seed=7).to(kind)
    out = memory.result(*shape, dtype=kind, value=before if accumulate else None)
    parts = [_apart(part, p.expert_stride) if p.expert_stride else part for part in out]
    problem = internals.WgradProblem(
        a=internals.Rows(data=held_a, stride=held_a.stride(0), index=index_a),
        b=internals.Rows(data=held_b, stride=held_b.stride(0), index=index_b),
        offsets=p.offsets(),
        R=p.R,
        E=p.E,
        M=p.N,
        N=p.K,
    )
    second = parts[1] if two_parts else None
    to = internals.StackedOut(
        first=parts[0], second=second, expert_stride=parts[0].stride(0), row_stride=p.K, split=split
    )
    library.wgrad(how.native(dtype), problem, internals.StoreGrad(out=to, fp32=fp32, accumulate=accumulate))
    memory.check()

    joined = torch.cat([parts[0][:, :split], parts[1][:, : p.N - split]], 1)
    old = torch.cat([before[0, :, :split], before[1, :, : p.N - split]], 1)

    def eager(x: Tensor, y: Tensor, like: torch.dtype) -> Tensor:
        parts = zip(x.split(list(p.counts)), y.split(list(p.counts)), strict=True)
        grad = torch.stack([left.mT @ right for left, right in parts]).to(like)
        return grad + old.to(like) if accumulate else grad

    base = eager(a.float(), b.float(), torch.float32) if fp32 else eager(a, b, dtype)
    testing.assert_accurate(joined, eager(a.double(), b.double(), torch.float64), base, name="dW", pool=64)
    empty = [e for e, count in enumerate(p.counts) if not count]
    assert torch.equal(joined[empty], old[empty] if accumulate else torch.zeros_like(old[empty])), (
        "experts without rows"
    )
    return joined
