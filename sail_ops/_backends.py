"""Which backend serves an operator, and why; the choice is made once, when sail_ops is imported.

SAIL_OPS_LIBRARY_DIR    where the compiled libraries are (_library.py)
SAIL_OPS_ISA            instruction set of the CPU kernels; the best of the machine otherwise (csrc/cpu)
SAIL_OPS_TRITON=1       Triton's kernels in place of the CUDA library's (here)
SAIL_OPS_CUDA_KERNELS   sm80, cluster or cutlass: kernels of the CUDA library (csrc/cuda/card.cu)
SAIL_OPS_ATTENTION      sail or flash_attn: attention of bf16 and fp16 on CUDA (_flash_attn.py)
SAIL_OPS_CHECK=1        values are looked at on an accelerator too (csrc, triton/checks.py)
"""

import os
from typing import NamedTuple

import torch

from . import _flash_attn, _library, _triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEYS = {"cpu": "CPU", "cuda": "CUDA", "npu": "PrivateUse1"}  # torch's dispatch keys, by type of device
ATTENTION = ("attention", "attention_varlen")
LINEAR = ("linear", "linear_backward")
# of the CUDA library's: what multiplies on tensor cores, and what walks rows by one stride
_HALF_ONLY = ("fused_experts", "grouped_experts", "grouped_mm", *ATTENTION)
_EVEN_ROWS = ("add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm", "swiglu")
_MOST_HEAD_DIM = {"cpu": 256, "cuda": 128, "flash_attn": 256}


class Support(NamedTuple):
    """True where a call runs; backend: cpu, cuda, triton, flash_attn, npu or torch, "" for none; why it is this one, or
    why the call raises."""

    supported: bool
    backend: str
    reason: str

    def __bool__(self) -> bool:
        return self.supported


def supports(
    op: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    head_dim: int | None = None,
    even_rows: bool = True,
    backend: str | None = None,
) -> Support:
    """Whether sail_ops.<op> takes tensors of this dtype on this device, which backend serves it, and why.

    head_dim: of attention's queries. even_rows: whether all rows lie at one distance (contiguous tensors, x[:, :D]).
    backend: the limits of this one, installed or not, in place of the one that serves the operator here.
    Raises ValueError for an operator or a device without a name here.
    """
    if op not in operators():
        raise ValueError(f"sail_ops: op: got {op!r}, expected one of {', '.join(operators())}")
    found = serving(op, device, dtype) if backend is None else Support(True, backend, "asked for")
    refusal = _refusal(found.backend, op, dtype, head_dim, even_rows) if found else None
    return found if refusal is None else Support(False, found.backend, refusal)


def serving(op: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> Support:
    """The backend of an operator's calls on this device, whatever its limits."""
    kind = device.type if isinstance(device, torch.device) else device.split(":")[0]
    if kind not in KEYS:
        raise ValueError(f"sail_ops: device: got {kind!r}, expected one of {', '.join(KEYS)}")
    if kind == "cuda" and op in ATTENTION and dtype != torch.float32 and _flash_attn.asked():
        return Support(True, "flash_attn", "SAIL_OPS_ATTENTION=flash_attn")
    if kind == "cuda" and op in TRITON:
        if not _triton.installed():
            return Support(False, "", f"{TRITON[op]}, and Triton is not installed")
        return Support(True, "triton", TRITON[op])
    if op in LINEAR and (kind != "cpu" or _library.torch_multiplies(dtype)):
        return Support(True, "torch", "sail_ops.linear is F.linear here" + ", but for few rows" * (kind == "cpu"))
    if not has_kernel(op, KEYS[kind]):
        return Support(False, "", f"no kernel of {op} for {kind}")
    return Support(True, kind, cpu_isa() if kind == "cpu" else "compiled")


def cpu_isa() -> str:
    """The instruction set in use, and who chose it; ValueError where SAIL_OPS_ISA names none of this machine."""
    asked = os.environ.get("SAIL_OPS_ISA")
    return f"{_library.cpu_isa()} ({f'SAIL_OPS_ISA={asked}' if asked else 'the best; SAIL_OPS_ISA overrides'})"


def operators() -> list[str]:
    """The names of torch.ops.sail_ops."""
    names: list[str] = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("sail_ops::") for name in names if name.startswith("sail_ops::"))


def has_kernel(op: str, key: str) -> bool:
    """Whether the operator has a kernel of its own for this dispatch key."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"sail_ops::{op}", key))


def _refusal(backend: str, op: str, dtype: torch.dtype, head_dim: int | None, even_rows: bool) -> str | None:
    """Why a backend does not take such tensors, in the words of its error; None: it does."""
    family = op.removesuffix("_backward")
    if backend == "triton" and op not in _triton.OPERATORS:
        return f"Triton has no kernel of {op}"
    if dtype not in DTYPES and backend != "torch":
        return "expected float32, bfloat16 or float16"
    if dtype == torch.float32 and (backend == "flash_attn" or backend == "cuda" and family in _HALF_ONLY):
        return "got float32, expected bfloat16 or float16 on a CUDA device"
    if head_dim is not None and family in ATTENTION and backend in _MOST_HEAD_DIM:
        most, step = _MOST_HEAD_DIM[backend], 8 if backend == "cuda" else 1
        if not 0 < head_dim <= most or head_dim % step:
            return f"got a head dim of {head_dim}, expected " + (
                f"a multiple of 8 up to {most} on a CUDA device" if backend == "cuda" else f"1 to {most}"
            )
    if backend == "cuda" and family in _EVEN_ROWS and not even_rows:
        return "got rows of uneven distance"
    return None


def use_triton(asked: bool = False) -> dict[str, str]:
    """Registers Triton's kernels for CUDA where the CUDA library has none for the cards here; {operator: why}."""
    archs = _library.cuda_archs()
    reason = "the CUDA library is not built"
    if archs:
        cards = _triton.cards()
        replace = bool(cards) and not any(_triton.runs_on(archs, card) for card in cards)
        reason = f"the CUDA library, built for sm_{archs.replace(',', ' and sm_')}, has none"
        if asked:
            reason = "SAIL_OPS_TRITON=1"
        asked = asked or replace
    names = [n for n in _triton.OPERATORS if asked or not has_kernel(n, "CUDA")]
    _triton.register(names, reason)
    return dict.fromkeys(names, reason)


# SAIL_OPS_TRITON=1: in place of the library's kernels too, to compare them
TRITON = use_triton(os.environ.get("SAIL_OPS_TRITON") == "1") if torch.version.cuda else {}
