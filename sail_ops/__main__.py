"""`python -m sail_ops`: what is built, what this machine has, and which implementation each operator will use."""

import platform
import sys
from importlib.metadata import version

import torch

from . import _backends, _flash_attn, _library


def main() -> int:
    print(f"sail_ops {version('sail-ops')}, torch {torch.__version__}, Python {platform.python_version()}")
    try:
        isa = _backends.cpu_isa()
    except ValueError as error:  # SAIL_OPS_ISA names none, or one the machine lacks
        print(f"CPU library   {_library.CPU_LIBRARY}\n  {error}")
        return 1
    print(f"CPU library   {_library.CPU_LIBRARY}")
    print(f"  instruction sets usable here: {', '.join(_library.cpu_isas())}")
    print(f"  in use: {isa}")
    print(f"  threads: {torch.get_num_threads()}, torch's own")
    print(f"CUDA library  {cuda_library()}")
    try:
        print(f"  attention of bf16 and fp16: {_flash_attn.describe()}")
    except ValueError as error:  # SAIL_OPS_ATTENTION
        print(f"  {error}")
        return 1
    print(f"devices       {', '.join(['CPU', *cuda_devices()])}")
    print(
        f"\n{'operator':28}"
        + "".join(f"{kind:16}" for kind in _backends.KEYS)
        + "\n"
        + "\n".join(map(row, _backends.operators()))
    )
    print("\n- : none; a call on such a tensor raises NotImplementedError")
    for reason in sorted(set(_backends.TRITON.values())):
        print(f"triton : {reason}")
    return 0


def row(op: str) -> str:
    """The operator and what serves it on each kind of device."""
    found = (_backends.serving(op, kind) for kind in _backends.KEYS)
    return f"{op:28}" + "".join(f"{word(backend):16}" for backend in found)


def word(found: _backends.Support) -> str:
    if not found:
        return "triton missing" if "Triton" in found.reason else "-"
    return {"cpu": _library.cpu_isa(), "cuda": "kernel", "npu": "kernel"}.get(found.backend, found.backend)


def cuda_library() -> str:
    """What became of the CUDA library, in words."""
    path = _library.CUDA_LIBRARY
    if not path.exists():
        return "not built (no nvcc was found, or SAIL_OPS_CUDA=OFF)"
    if not _library.HAS_CUDA:
        return f"{path}, not loaded: this torch has no CUDA"
    archs = ", ".join(f"sm_{arch}" for arch in _library.cuda_archs().split(","))
    return f"{path}, for {archs}" + (", with CUTLASS's grouped GEMM" if _library.has_cutlass() else "")


def cuda_devices() -> list[str]:
    """Name and compute capability of every CUDA device torch sees."""
    if not torch.cuda.is_available():
        return ["no CUDA device"]
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{device.name} (sm_{device.major}{device.minor})" for device in devices]


if __name__ == "__main__":
    sys.exit(main())
