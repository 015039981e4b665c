"""`python -m sail_ops`: what is built, what this machine has, and which implementation each operator will use."""

import ctypes
import os
import platform
import sys
from importlib.metadata import version

import torch

from . import _flash_attn, _library, _triton

KEYS = ("CPU", "CUDA", "PrivateUse1")  # the last is what torch calls an accelerator from outside, such as an NPU


def main() -> int:
    print(f"sail_ops {version('sail-ops')}, torch {torch.__version__}, Python {platform.python_version()}")
    try:
        isa = _library.cpu_isa()
    except ValueError as error:  # SAIL_OPS_ISA names none, or one the machine lacks
        print(f"CPU library   {_library.CPU_LIBRARY}\n  {error}")
        return 1
    asked = os.environ.get("SAIL_OPS_ISA")
    print(f"CPU library   {_library.CPU_LIBRARY}")
    print(f"  instruction sets usable here: {', '.join(_library.cpu_isas())}")
    print(f"  in use: {isa} ({f'SAIL_OPS_ISA={asked}' if asked else 'the best; SAIL_OPS_ISA overrides'})")
    print(f"  threads: {torch.get_num_threads()}, torch's own")
    print(f"CUDA library  {cuda_library()}")
    try:
        print(f"  attention of bf16 and fp16: {_flash_attn.in_words()}")
    except ValueError as error:  # SAIL_OPS_ATTENTION
        print(f"  {error}")
        return 1
    print(f"devices       {', '.join(['CPU', *cuda_devices()])}")
    print(f"\n{'operator':28}{'CPU':16}{'CUDA':16}{'PrivateUse1'}")
    triton = "triton" if _triton.installed() else "triton missing"
    for name in operators():
        row = implementations(name)
        cpu = isa if row["CPU"] else "-"
        cuda = triton if name in _library.TRITON else "kernel" if row["CUDA"] else "-"
        print(f"{name:28}{cpu:16}{cuda:16}{'kernel' if row['PrivateUse1'] else '-'}")
    print("\n- : none; a call on such a tensor raises NotImplementedError")
    return 0


def operators() -> list[str]:
    """The names of torch.ops.sail_ops."""
    names: list[str] = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("sail_ops::") for name in names if name.startswith("sail_ops::"))


def implementations(name: str) -> dict[str, bool]:
    """Whether the operator has a kernel of its own, by dispatch key."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {key: has(f"sail_ops::{name}", key) for key in KEYS}


def cuda_library() -> str:
    """What became of the CUDA library, in words."""
    path = _library.CUDA_LIBRARY
    if not path.exists():
        return "not built (no nvcc was found, or SAIL_OPS_CUDA=OFF)"
    if not _library.HAS_CUDA:
        return f"{path}, not loaded: this torch has no CUDA"
    library = ctypes.CDLL(str(path))
    library.sail_cuda_archs.restype = ctypes.c_char_p
    archs = ", ".join(f"sm_{arch}" for arch in library.sail_cuda_archs().decode().split(","))
    return f"{path}, for {archs}" + (", with CUTLASS's grouped GEMM" if _library.has_cutlass() else "")


def cuda_devices() -> list[str]:
    """Name and compute capability of every CUDA device torch sees."""
    if not torch.cuda.is_available():
        return ["no CUDA device"]
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{device.name} (sm_{device.major}{device.minor})" for device in devices]


if __name__ == "__main__":
    sys.exit(main())
