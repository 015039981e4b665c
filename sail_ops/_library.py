"""Loads the compiled libraries, which register torch.ops.sail_ops.*."""

import ctypes
from pathlib import Path

import torch

_HERE = Path(__file__).resolve().parent
CPU_LIBRARY = _HERE / "libsail_ops_cpu.so"
CUDA_LIBRARY = _HERE / "libsail_ops_cuda.so"

if not CPU_LIBRARY.exists():
    raise ImportError(f"sail_ops is not built: {CPU_LIBRARY} is missing; run `pip install -e .` in the source folder")
torch.ops.load_library(str(CPU_LIBRARY))

HAS_CUDA = bool(torch.version.cuda) and CUDA_LIBRARY.exists()
if HAS_CUDA:
    torch.ops.load_library(str(CUDA_LIBRARY))


def cpu_isa() -> str:
    """The instruction set the CPU kernels use on this machine: generic, avx2, avx512 or avx512_bf16."""
    lib = ctypes.CDLL(str(CPU_LIBRARY))
    lib.sail_cpu_isa.restype = ctypes.c_char_p
    name: str = lib.sail_cpu_isa().decode()
    if name.startswith("error: "):
        raise ValueError(name.removeprefix("error: "))
    return name
