"""Loads the compiled libraries, which register torch.ops.sail_ops.*."""

import ctypes
import os
from pathlib import Path

import torch

from . import _triton

# SAIL_OPS_LIBRARY_DIR: another build of the same version (sanitizers, mutation tests)
_HERE = Path(os.environ.get("SAIL_OPS_LIBRARY_DIR") or Path(__file__).resolve().parent)
CPU_LIBRARY = _HERE / "libsail_ops_cpu.so"
CUDA_LIBRARY = _HERE / "libsail_ops_cuda.so"

if not CPU_LIBRARY.exists():
    raise ImportError(f"sail_ops is not built: {CPU_LIBRARY} is missing; run `pip install -e .` in the source folder")
torch.ops.load_library(str(CPU_LIBRARY))
_cpu = ctypes.CDLL(str(CPU_LIBRARY))
_cpu.sail_cpu_isa.restype = _cpu.sail_cpu_isas.restype = _cpu.sail_cpu_set_isa.restype = ctypes.c_char_p
_cpu.sail_cpu_set_isa.argtypes = [ctypes.c_char_p]

HAS_CUDA = bool(torch.version.cuda) and CUDA_LIBRARY.exists()
if HAS_CUDA:
    torch.ops.load_library(str(CUDA_LIBRARY))


def use_triton(asked: bool = False) -> tuple[str, ...]:
    """Registers Triton's kernels for CUDA where the CUDA library has none for the cards here; returns the operators."""
    reason = "the CUDA library is not built"
    if HAS_CUDA:
        library = ctypes.CDLL(str(CUDA_LIBRARY))
        library.sail_cuda_archs.restype = ctypes.c_char_p
        archs, cards = library.sail_cuda_archs().decode(), _triton.cards()
        asked = asked or bool(cards) and not any(_triton.runs_on(archs, card) for card in cards)
        reason = f"the CUDA library, built for sm_{archs.replace(',', ' and sm_')}, has none"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = tuple(n for n in _triton.OPERATORS if asked or not has(f"sail_ops::{n}", "CUDA"))
    _triton.register(names, reason)
    return names


# SAIL_OPS_TRITON=1: in place of the library's kernels too, to compare them
TRITON = use_triton(os.environ.get("SAIL_OPS_TRITON") == "1") if torch.version.cuda else ()


def has_cutlass() -> bool:
    """Whether CUTLASS's grouped GEMM is in the CUDA library; SAIL_OPS_CUDA_KERNELS=cutlass gives it to grouped_mm."""
    if not HAS_CUDA:
        return False
    library = ctypes.CDLL(str(CUDA_LIBRARY))
    library.sail_cuda_has_cutlass.restype = ctypes.c_bool
    return bool(library.sail_cuda_has_cutlass())


def set_cuda_kernels(name: str) -> None:
    """For benchmarks: takes SAIL_OPS_CUDA_KERNELS' place from now on, in the whole process; "" is the default."""
    if not HAS_CUDA:
        raise RuntimeError("sail_ops: the CUDA library is not built, or this torch is not for CUDA")
    library = ctypes.CDLL(str(CUDA_LIBRARY))
    library.sail_cuda_set_kernels.restype = ctypes.c_char_p
    _text(library.sail_cuda_set_kernels(name.encode()))


def cpu_isa() -> str:
    """The instruction set the CPU kernels use: generic, avx2, avx512 or avx512_bf16."""
    return _text(_cpu.sail_cpu_isa())


def cpu_isas() -> tuple[str, ...]:
    """Those that this library contains and this machine has, weakest first."""
    return tuple(_text(_cpu.sail_cpu_isas()).split(", "))


def set_cpu_isa(name: str | None) -> None:
    """For tests: the instruction set to use from now on, in the whole process; None goes back to the default."""
    _text(_cpu.sail_cpu_set_isa(None if name is None else name.encode()))


def empty_cache() -> None:
    """Frees the transient buffers, at most 384 MB, that this thread keeps on the CPU from one call to the next.

    As torch.cuda.empty_cache: never needed for correctness, and the next call pays for new pages.
    """
    _cpu.sail_cpu_empty_cache()


def _text(answer: bytes) -> str:
    text = answer.decode()
    if text.startswith("error: "):
        raise ValueError(text.removeprefix("error: "))
    return text
