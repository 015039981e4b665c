"""What tests and benchmarks share: the accuracy rule, shape cases, and the choice of CPU instruction set.

The rule: the error of a result against fp64 is at most twice the error of eager PyTorch in the same dtype, for the
worst element and for every row. `check_op` applies it to every output and every gradient of an operator.
There are no literal tolerances.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import _library

MIN_ROW = 64  # an RMS over fewer elements fails by chance (K = 8: 3% of the rows of equally accurate kernels)
CHANCE = 8.0  # k for any shape: with a dozen numbers equally accurate results differ by chance, a wrong index by 1e6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# ---- shape cases, by name
NORM_SHAPES: dict[str, tuple[int, ...]] = {
    "empty": (0, 64),
    "one_row": (1, 2048),
    "small_row": (199, 64),
    "odd_row": (199, 77),
    "three_dims": (3, 11, 128),
    "model": (199, 2048),
    "wide": (2, 65536),
}


class ExpertsCase(NamedTuple):
    """T tokens, D hidden, F expert width, E experts, K top-k, and which experts the tokens go to."""

    T: int
    D: int
    F: int
    E: int
    K: int
    routing: str = "uniform"  # "hot": all on expert 0 first; "dropped": a third of the ids are outside [0, E)


EXPERTS_CASES: dict[str, ExpertsCase] = {
    "no_token": ExpertsCase(0, 64, 32, 4, 2),
    "one_token": ExpertsCase(1, 128, 96, 8, 2),
    "odd": ExpertsCase(199, 77, 33, 8, 2),
    "tiny": ExpertsCase(5, 7, 3, 2, 1),
    "empty_experts": ExpertsCase(6, 64, 64, 32, 2),
    "hot": ExpertsCase(199, 64, 48, 8, 2, "hot"),
    "dropped": ExpertsCase(67, 64, 48, 8, 4, "dropped"),
    "all_experts": ExpertsCase(33, 64, 32, 4, 4),
    "model": ExpertsCase(199, 256, 192, 16, 4),
}


class AttentionCase(NamedTuple):
    """B batch, S queries and L keys of a sequence, H query heads, G key/value heads, A head dim."""

    B: int
    S: int
    L: int
    H: int
    G: int
    A: int
    causal: bool = False


ATTENTION_CASES: dict[str, AttentionCase] = {
    "one_token": AttentionCase(8, 1, 1, 4, 2, 64, causal=True),
    "odd": AttentionCase(1, 199, 199, 4, 2, 80, causal=True),
    "full": AttentionCase(4, 131, 131, 3, 3, 72),
    "one_key_head": AttentionCase(1, 70, 70, 6, 1, 96, causal=True),
    "more_keys": AttentionCase(1, 61, 150, 4, 2, 64, causal=True),
    "fewer_keys": AttentionCase(1, 150, 33, 4, 2, 64),
    "narrow": AttentionCase(16, 40, 37, 2, 1, 7),
    "widest": AttentionCase(1, 67, 135, 2, 1, 256, causal=True),
    "heads_of_two_blocks": AttentionCase(1, 9, 30, 140, 1, 64, causal=True),
    "decode_one": AttentionCase(2, 1, 1100, 8, 2, 128, causal=True),
    "decode_some": AttentionCase(1, 5, 700, 8, 2, 128, causal=True),
    "model": AttentionCase(1, 300, 300, 8, 2, 128, causal=True),
}


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Normal values of the given scale, the same on every call with the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def random_ids(case: ExpertsCase, seed: int = 0) -> Tensor:
    """ids_TK int64, distinct within a token, as `case.routing` says."""
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(case.T, case.E, generator=generator)
    if case.routing == "hot":
        scores_TE[:, 0] = 2
    ids_TK = scores_TE.topk(case.K, dim=-1).indices
    if case.routing == "dropped":
        drop_TK = torch.rand(ids_TK.shape, generator=generator) < 1 / 3
        outside = torch.tensor([-1, case.E, case.E + 7])[torch.randint(3, ids_TK.shape, generator=generator)]
        ids_TK = torch.where(drop_TK, outside, ids_TK)
    return ids_TK


# ---- the accuracy rule
def assert_accurate(
    out: Tensor, ref: Tensor, base: Tensor, k: float = 2.0, name: str = "result", pool: int = 1
) -> None:
    """max|out - ref| <= k max|base - ref|, and the same for the RMS of every row.

    `ref` is fp64, `base` eager PyTorch in out's dtype. Both conditions, because each is blind to bugs that the other
    sees. A base that is exact by chance counts as having the error of one rounding. Non-finite values always fail.
    pool: rows that are judged together, where the elements of one share an error: a weight's gradient from one token
    is an outer product, each row as far off as one number.
    """
    assert out.shape == ref.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    assert out.dtype == base.dtype, f"{name}: {out.dtype}, expected {base.dtype}"
    if not out.numel():
        return
    assert out.isfinite().all(), f"{name}: {int((~out.isfinite()).sum())} non-finite values"
    eps = torch.finfo(out.dtype).eps
    # fp32 results carry the rounding of a reduction as well; narrower ones were rounded once, uniformly
    wide = out.dtype == torch.float32
    floor, worst_floor = (eps, eps) if wide else (eps / 12**0.5, eps / 2)
    ref = ref.detach().double()
    err, err_base = (out.detach().double() - ref).abs(), (base.detach().double() - ref).abs()
    worst, budget = err.max(), k * torch.maximum(err_base.max(), worst_floor * ref.abs().max())
    assert worst <= budget, f"{name}: worst element is {worst:.3e} off, budget {budget:.3e}"
    block = max(MIN_ROW, pool * ref.shape[-1] if ref.dim() else 1)
    row_err, row_base, row_ref = (_row_rms(t, block) for t in (err, err_base, ref))
    row_budget = k * torch.maximum(row_base, floor * row_ref)
    bad = (row_err > row_budget).nonzero().flatten()
    assert not bad.numel(), (
        f"{name}: {len(bad)} of {len(row_err)} rows over budget, "
        f"first {int(bad[0])}: RMS error {row_err[bad[0]]:.3e}, budget {row_budget[bad[0]]:.3e}"
    )


def _row_rms(t: Tensor, block: int) -> Tensor:
    """RMS of every row of at least `block` elements; shorter ones are pooled into such blocks, the last overlapping."""
    if t.dim() and t.shape[-1] >= block:
        rows = t.reshape(-1, t.shape[-1])
    elif t.numel() >= block:
        flat = t.reshape(-1)
        whole = flat[: flat.numel() // block * block].reshape(-1, block)
        rows = torch.cat([whole, flat[-block:].reshape(1, -1)])
    else:
        rows = t.reshape(1, -1)
    return rows.square().mean(-1).sqrt()


def check_op(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    *args: Any,
    base: Callable[..., Any] | None = None,
    k: float = 2.0,
    pool: Mapping[str, int] | None = None,
    **kwargs: Any,
) -> None:
    """Holds op(*args, **kwargs) to the accuracy rule: every output, and the gradient of every input that requires one.

    `reference` runs on the same values in fp64; `base` (default: `reference`) in the given dtypes. Tensors may be
    nested in tuples and keyword arguments. Integer outputs must be equal to those of the fp64 run.
    `pool`: by the input's name ("args[1]", "kwargs['scale']"), how many rows of its gradient are judged together; also
    by the output's ("outputs[0]").
    """
    got = run(op, *args, **kwargs)
    wide_args, wide_kwargs = pytree.tree_map_only(Tensor, _double, (args, kwargs))
    want = run(reference, *wide_args, upstream=got.upstream, **wide_kwargs)
    eager = run(base or reference, *args, upstream=got.upstream, **kwargs)
    for i, (o, r, b) in enumerate(zip(got.outputs, want.outputs, eager.outputs, strict=True)):
        if o.is_floating_point():
            assert_accurate(o, r, b, k, f"output {i}", (pool or {}).get(f"outputs[{i}]", 1))
        else:
            assert o.dtype == r.dtype and torch.equal(o, r), f"output {i}: integers differ from the reference"
    for name, ref in want.gradients.items():
        grad, grad_base = got.gradients[name], eager.gradients[name]
        if ref is None:
            assert grad is None or not grad.any(), f"gradient of {name}: the result does not depend on it"
        else:
            assert grad is not None and grad_base is not None, f"gradient of {name}: missing"
            assert_accurate(grad, ref, grad_base, k, f"gradient of {name}", (pool or {}).get(name, 1))


class Run(NamedTuple):
    """Outputs of one call, the gradients that were sent into it, and those that came out, by the input's name."""

    outputs: list[Tensor]
    upstream: list[Tensor | None]
    gradients: dict[str, Tensor | None]


def run(fn: Callable[..., Any], *args: Any, upstream: list[Tensor | None] | None = None, **kwargs: Any) -> Run:
    """Calls fn and, where inputs require gradients, its backward; `upstream` defaults to fixed random values."""
    outputs = [o for o in pytree.tree_leaves(fn(*args, **kwargs)) if isinstance(o, Tensor)]
    if upstream is None:
        upstream = [
            random(*o.shape, dtype=o.dtype, seed=1 + i).to(o.device) if o.requires_grad else None
            for i, o in enumerate(outputs)
        ]
    inputs = {
        kind + pytree.keystr(path): leaf
        for kind, tree in (("args", args), ("kwargs", kwargs))
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]
        if isinstance(leaf, Tensor) and leaf.requires_grad
    }
    grads: tuple[Tensor | None, ...] = ()
    if inputs:
        differentiable = [(o, u) for o, u in zip(outputs, upstream, strict=True) if u is not None and o.requires_grad]
        assert differentiable, "inputs require gradients, but no output does"
        out, sent = zip(*((o, u.to(o.dtype)) for o, u in differentiable), strict=True)
        grads = torch.autograd.grad(out, list(inputs.values()), sent, allow_unused=True)
    return Run([o.detach() for o in outputs], upstream, dict(zip(inputs, grads, strict=True)))


def _double(t: Tensor) -> Tensor:
    wide = t.detach().double() if t.is_floating_point() else t
    return wide.requires_grad_(t.requires_grad)


def check_repeatable(fn: Callable[..., Any], *args: Any, times: int = 20, **kwargs: Any) -> None:
    """Outputs and gradients are bitwise the same on every call."""
    first = run(fn, *args, **kwargs)
    for _ in range(times - 1):
        again = run(fn, *args, **kwargs)
        assert_same(again, first)


def check_traceable(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """torch.compile(fullgraph=True) and torch.export accept fn and give bitwise the eager results and gradients."""
    eager = run(fn, *args, **kwargs)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, *args, **kwargs), eager)

    class Module(torch.nn.Module):
        def forward(self, *a: Any, **kw: Any) -> Any:
            return fn(*a, **kw)

    exported = torch.export.export(Module(), args, kwargs).module()
    with torch.no_grad():
        assert_same(
            Run(run(exported, *pytree.tree_map_only(Tensor, Tensor.detach, args), **kwargs).outputs, [], {}),
            Run(eager.outputs, [], {}),
        )


def assert_same(a: Run, b: Run) -> None:
    """Bitwise equal outputs and gradients."""
    pairs = [*zip(a.outputs, b.outputs, strict=True), *((a.gradients[n], g) for n, g in b.gradients.items())]
    for x, y in pairs:
        assert (x is None) == (y is None)
        assert x is None or y is None or torch.equal(x, y), "results differ in their bits"


# ---- instruction sets
def cpu_isas() -> tuple[str, ...]:
    """The instruction sets of the CPU library that this machine has, weakest first."""
    return _library.cpu_isas()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """CPU kernels use this instruction set inside the block, in the whole process."""
    _library.set_cpu_isa(name)
    try:
        yield
    finally:
        _library.set_cpu_isa(None)
