"""Loads the compiled libraries, each once, which registers torch.ops.sail_ops.*; their C functions."""

import ctypes
import os
from pathlib import Path

import torch

# SAIL_OPS_LIBRARY_DIR: another build of the same version (sanitizers, mutation tests)
_HERE = Path(os.environ.get("SAIL_OPS_LIBRARY_DIR") or Path(__file__).resolve().parent)
CPU_LIBRARY = _HERE / "libsail_ops_cpu.so"
CUDA_LIBRARY = _HERE / "libsail_ops_cuda.so"


def _load(path: Path, **functions: type) -> ctypes.CDLL:
    """The library, its operators registered; functions: what its C functions return."""
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    for name, result in functions.items():
        if not hasattr(library, name):
            raise ImportError(
                f"sail_ops: {path} was built from other sources (it has no {name}); build it again: pip install -e ."
            )
        getattr(library, name).restype = result
    return library


if not CPU_LIBRARY.exists():
    raise ImportError(f"sail_ops is not built: {CPU_LIBRARY} is missing; run `pip install -e .` in the source folder")
_text = ctypes.c_char_p
_names = ("isa", "isas", "set_isa", "torch_products")
_cpu = _load(CPU_LIBRARY, **{f"sail_cpu_{name}": _text for name in _names})
_cpu.sail_cpu_set_isa.argtypes = [_text]

HAS_CUDA = bool(torch.version.cuda) and CUDA_LIBRARY.exists()
if HAS_CUDA:
    _cuda = _load(CUDA_LIBRARY, sail_cuda_archs=_text, sail_cuda_has_cutlass=ctypes.c_bool, sail_cuda_set_kernels=_text)


def cuda_archs() -> str:
    """What the CUDA library holds code for, as "80,90a"; "" where there is none."""
    return _answer(_cuda.sail_cuda_archs()) if HAS_CUDA else ""


def has_cutlass() -> bool:
    """Whether CUTLASS's grouped GEMM is in the CUDA library; SAIL_OPS_CUDA_KERNELS=cutlass gives it to grouped_mm."""
    return HAS_CUDA and bool(_cuda.sail_cuda_has_cutlass())


def set_cuda_kernels(name: str) -> None:
    """For benchmarks: takes SAIL_OPS_CUDA_KERNELS' place from now on, in the whole process; "" is the default."""
    if not HAS_CUDA:
        raise RuntimeError("sail_ops: the CUDA library is not built, or this torch is not for CUDA")
    _answer(_cuda.sail_cuda_set_kernels(name.encode()))


def cpu_isa() -> str:
    """The instruction set the CPU kernels use: generic, avx2, avx512 or avx512_bf16."""
    return _answer(_cpu.sail_cpu_isa())


def cpu_isas() -> tuple[str, ...]:
    """Those that this library contains and this machine has, weakest first."""
    return tuple(_answer(_cpu.sail_cpu_isas()).split(", "))


def torch_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch's dense products of this dtype are at least as fast as ours with the instruction set in use."""
    return dtype in _torch_products


def _read_torch_products() -> frozenset[torch.dtype]:
    """A Python object, as torch.compile cannot look into C; where SAIL_OPS_ISA is wrong, the operators say so."""
    said = _cpu.sail_cpu_torch_products().decode()
    return frozenset(getattr(torch, name) for name in said.split(", ")) if "error" not in said else frozenset()


_torch_products = _read_torch_products()


def set_cpu_isa(name: str | None) -> None:
    """For tests: the instruction set to use from now on, in the whole process; None goes back to the default."""
    global _torch_products
    _answer(_cpu.sail_cpu_set_isa(None if name is None else name.encode()))
    _torch_products = _read_torch_products()


def empty_cache() -> None:
    """Frees the transient buffers, at most 384 MB, that this thread keeps on the CPU from one call to the next.

    As torch.cuda.empty_cache: never needed for correctness, and the next call pays for new pages.
    """
    _cpu.sail_cpu_empty_cache()


def _answer(text: bytes) -> str:
    """What a C function says; its errors raise."""
    said = text.decode()
    if said.startswith("error: "):
        raise ValueError(said.removeprefix("error: "))
    return said
