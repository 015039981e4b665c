"""The CUDA library on the emulator of CUDA kernels (tests/cuda_emulation): the same host files and kernels, compiled by
g++, on CPU tensors. Inside `emulated()` the public functions of sail_ops use it, so that tests of the CPU are tests of
the CUDA sources too: checks, plan, launches, indices and sums; not speed, nor a tensor core's rounding."""

import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from compiled import FOLDER, digest, run

from sail_ops._backends import operators

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests" / "cuda_emulation"
# -O1: half of -O2's time to compile, and the tests' cases are small. TLS: see tests/support/emulated.py
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-fno-extern-tls-init", "-w"]
FLAGS += ["-fno-gnu-unique", "-U_FORTIFY_SOURCE", "-DSAIL_EMULATE_CUDA", '-DSAIL_CUDA_ARCHS="80"']


@contextmanager
def emulated(root: Path = ROOT, only: tuple[str, ...] = ()) -> Iterator[None]:
    """Calls of sail_ops on CPU tensors run the emulated CUDA library inside the block."""
    _load(root, only)
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    override = torch.library.Library("sail_ops", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # overriding is what this is for
        for name in operators():
            op = getattr(torch.ops.sail_ops, name).default
            override.impl(name, lambda *args, op=op: op.redispatch(cuda, *args), "CPU", allow_override=True)
    try:
        yield
    finally:
        override._destroy()


@cache
def _load(root: Path, only: tuple[str, ...]) -> None:
    torch.ops.load_library(str(build(root, only)))


def build(root: Path = ROOT, only: tuple[str, ...] = ()) -> Path:
    """The library of the sources below `root`, or of those named in `only`; objects of unchanged sources are kept."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here")
    files = [p for f in (root / "csrc" / "cuda", root / "csrc" / "torch", EMULATION) for p in f.rglob("*")]
    folder = FOLDER / digest(*sorted(p for p in files if p.suffix in (".h", ".cuh")), Path(__file__))
    folder.mkdir(parents=True, exist_ok=True)
    sources = [p for p in (root / "csrc" / "cuda").glob("*.cu") if "sm90" not in p.name]
    sources = [p for p in sources if not only or p.stem in only]
    sources.append(EMULATION / "host" / "torch_cuda.cpp")
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(lambda source: _compile(compiler, folder, root, source), sources))
    library = folder / f"{digest(*objects)}.so"
    if not library.exists():
        torch_libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
        run(library, compiler, "-shared", *map(str, objects), *torch_libraries)
    return library


def _compile(compiler: str, folder: Path, root: Path, source: Path) -> Path:
    out = folder / f"{source.stem}_{digest(source)}.o"
    if not out.exists():
        include = [f"-I{p}" for p in (EMULATION / "host", EMULATION, root / "csrc" / "cuda", root)]
        run(out, compiler, *FLAGS, *include, "-x", "c++", "-c", str(source))
    return out
