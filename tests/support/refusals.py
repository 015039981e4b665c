"""What CUDA's kernels take less than the CPU's: sail_ops.supports says it, and every call of a test is held to that."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sail_ops
from sail_ops import supports
from sail_ops._backends import DTYPES, operators


def judged_operator(name: str) -> Callable[..., Any]:
    """torch.ops.sail_ops.<name>, its calls held to `supports` where the public functions' are."""
    op: Callable[..., Any] = getattr(torch.ops.sail_ops, name)
    judge = getattr(getattr(sail_ops, name), "judge", None)
    return judge(op) if judge else op


def judge_public_operators(backend: str | None) -> None:
    """From now on a call that `backend` (None: what serves CUDA here) does not take must raise ValueError (with the
    reason that `supports` gives, its test is skipped); every other call must do as the test says."""
    for name in sorted(set(operators()) & set(sail_ops.__all__)):
        setattr(sail_ops, name, _judged(name, getattr(sail_ops, name), backend))


def _judged(name: str, op: Callable[..., Any], backend: str | None) -> Callable[..., Any]:
    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        x = next(iter((*args, *kwargs.values())), None)
        if torch.compiler.is_compiling() or not isinstance(x, Tensor):
            return op(*args, **kwargs)
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        options = {"head_dim": x.shape[-1] if x.dim() else 0, "even_rows": all(map(_even, args))}
        answer = supports(name, "cuda", dtype, backend=backend, **options)
        if answer or dtype not in DTYPES:  # what no backend takes is the test's to expect
            return op(*args, **kwargs)
        try:
            op(*args, **kwargs)
        except ValueError as error:
            if answer.reason in str(error):
                pytest.skip(answer.reason)
            raise
        raise AssertionError(f"sail_ops.{name} ran, though sail_ops.supports says: {answer.reason}")

    call.judge = functools.partial(_judged, name, backend=backend)  # type: ignore[attr-defined]
    return call


def _even(t: Any) -> bool:
    """Whether the rows of [..., D] are walked by one stride."""
    if not isinstance(t, Tensor) or not t.numel():
        return True
    steps = [(n, s) for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n > 1]
    return all(outer == n * inner for (_, outer), (n, inner) in zip(steps, steps[1:], strict=False))
