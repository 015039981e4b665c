"""Calls the emulated attention kernels (csrc/cuda/kernels/attention.h) with tensors.

Operands lie between NaNs that copies may not read, results between NaNs that must stay: a read or write past an end
shows.
B sequences, S queries and L keys of each, H query heads, G key/value heads, D head dim.
"""

from typing import Any, NamedTuple

import emulated
import internals
import torch
from grouped_gemm import ELEMENTS, Memory
from torch import Tensor

from sail_ops import reference, testing

DTYPES = (torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """Lengths of queries and keys: one pair is repeated `B` times, more are a pack."""

    lengths: tuple[tuple[int, int], ...]
    H: int = 2
    G: int = 1
    D: int = 64
    causal: bool = True
    B: int = 0  # 0: a pack
    gap: int = 0  # elements between heads of q, k and v
    scale: float | None = None
    dlse: bool = False

    @property
    def tokens(self) -> tuple[int, int]:
        q, k = (sum(n) for n in zip(*self.lengths, strict=True))
        return q, k

    def cu(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if self.B:
            return None, None
        q, k = (torch.tensor([0, *n]).cumsum(0).int() for n in zip(*self.lengths, strict=True))
        return q, k

    def softmax_scale(self) -> float:
        return self.D**-0.5 if self.scale is None else self.scale


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None


class Outputs(NamedTuple):
    out: Tensor
    lse: Tensor
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    S, L = case.tokens
    shape = [case.B] if case.B else []
    q = testing.random(*shape, S, case.H, case.D, dtype=dtype)
    k, v = (testing.random(*shape, L, case.G, case.D, dtype=dtype, seed=s) for s in (1, 2))
    dout = testing.random(*shape, S, case.H, case.D, dtype=dtype, seed=3)
    return Inputs(q, k, v, dout, testing.random(*shape, case.H, S, seed=4) if case.dlse else None)


def expected(case: Case, x: Inputs, dtype: torch.dtype) -> Outputs:
    """By the reference, in `dtype`."""
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in (x.q, x.k, x.v))
    how: dict[str, Any] = {"causal": case.causal, "softmax_scale": case.softmax_scale(), "return_lse": True}
    cu_q, cu_k = case.cu()
    if cu_q is None:
        out, lse = reference.attention(q, k, v, **how)
    else:
        out, lse = reference.attention_varlen(q, k, v, cu_q, cu_k, 0, 0, **how)
    seen = lse.isfinite()
    dlse = torch.zeros_like(lse) if x.dlse is None else x.dlse.to(lse.dtype)
    total = (out * x.dout.to(dtype)).sum() + (torch.where(seen, lse, 0) * dlse).sum()
    dq, dk, dv = torch.autograd.grad(total, (q, k, v))
    return Outputs(out.detach(), lse.detach(), dq, dk, dv)


class Call(NamedTuple):
    """How, and the fields that all problems share; what a launch writes is checked by `memory`."""

    memory: Memory
    how: Any
    fields: dict[str, Any]


def call(library: emulated.Library, case: Case, x: Inputs, seed: int, cu: tuple[Any, Any] | None = None) -> Call:
    memory = Memory()
    library.forget_allowed()
    rows = {}
    for name, t in zip("qkv", (x.q, x.k, x.v), strict=True):
        held = memory.operand(t, pitch=case.gap)
        allow(library, held)
        batch = held.stride(0) if case.B else 0
        rows[name] = internals.HeadRows(data=held, batch=batch, token=held.stride(-3), head=held.stride(-2))
    S, L = case.tokens
    sizes = {"B": case.B or len(case.lengths), "S": S, "L": L, "H": case.H, "G": case.G, "D": case.D}
    cu_q, cu_k = case.cu() if cu is None else cu
    fields = {"cu_q": cu_q, "cu_k": cu_k, "causal": case.causal, "scale": case.softmax_scale()}
    how = internals.How(dtype=getattr(internals.Element, ELEMENTS[x.q.dtype]), seed=seed)
    return Call(memory, how, rows | sizes | fields)


def allow(library: emulated.Library, t: Tensor) -> None:
    """Copies may read t, and nothing that has not been named."""
    size = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
    library.allow(t, size * t.element_size())


def forward(library: emulated.Library, case: Case, x: Inputs, seed: int = 0, cu: Any = None) -> Outputs:
    memory, how, fields = call(library, case, x, seed, cu)
    out, lse = results(memory, case, x)
    library.forward(how, internals.AttentionForward(**fields, out=out, lse=lse))
    memory.check()
    return Outputs(out.clone(), lse.clone())


def decode(
    library: emulated.Library, case: Case, x: Inputs, splits: tuple[int, int], seed: int = 0, cu: Any = None
) -> Outputs:
    """splits: their number, and keys of each."""
    memory, how, fields = call(library, case, x, seed, cu)
    out, lse = results(memory, case, x)
    partial_out = memory.result(splits[0], out.numel() // case.D, case.D, dtype=torch.float32)
    partial_lse = memory.result(splits[0], lse.numel(), dtype=torch.float32)
    partial_out.fill_(torch.nan), partial_lse.fill_(torch.nan)
    most = max(q for q, _ in case.lengths)
    fields |= {"out": out, "lse": lse, "partial_out": partial_out, "partial_lse": partial_lse}
    library.decode(how, internals.AttentionDecode(**fields, most_queries=most, splits=splits[0], chunk=splits[1]))
    memory.check()
    return Outputs(out.clone(), lse.clone())


def results(memory: Memory, case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    S, _ = case.tokens
    lse = memory.result(*([case.B] if case.B else []), case.H, S, dtype=torch.float32)
    return memory.result(*x.q.shape, dtype=x.q.dtype).fill_(torch.nan), lse.fill_(torch.nan)


def backward(library: emulated.Library, case: Case, x: Inputs, made: Outputs, seed: int = 0, cu: Any = None) -> Outputs:
    memory, how, fields = call(library, case, x, seed, cu)
    stats = memory.result(made.lse.numel(), 2, dtype=torch.float32).fill_(torch.nan)
    dq, dk, dv = (memory.result(*t.shape, dtype=t.dtype).fill_(torch.nan) for t in (x.q, x.k, x.v))
    dout, out = memory.operand(x.dout), memory.operand(made.out)
    for t in (dout, stats):
        allow(library, t)
    fields |= {"dout": dout, "out": out, "lse": made.lse, "dlse": x.dlse}
    library.backward(how, internals.AttentionBackward(**fields, stats=stats, dq=dq, dk=dk, dv=dv))
    memory.check()
    return Outputs(made.out, made.lse, dq.clone(), dk.clone(), dv.clone())


def assert_accurate(got: Outputs, case: Case, x: Inputs) -> None:
    """The rule, for every output and gradient there is; rows that saw no key are exactly 0 and -inf."""
    want, eager = expected(case, x, torch.float64), expected(case, x, x.q.dtype)
    nothing = want.lse == -torch.inf
    assert torch.equal(got.lse == -torch.inf, nothing), "rows without a key"
    finite = [o.lse.masked_fill(nothing, 0) for o in (got, want, eager)]
    testing.assert_accurate(*finite, name="lse")
    for name, pool in (("out", 1), ("dq", 64), ("dk", 64), ("dv", 1)):
        ours = getattr(got, name)
        if ours is not None:
            # few keys or few queries leave a row of dq or dk with one error: that of out in sum(dout * out), or of dS
            testing.assert_accurate(ours, getattr(want, name), getattr(eager, name), name=name, pool=pool)
