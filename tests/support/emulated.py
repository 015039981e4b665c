"""Compiles CUDA kernels for the CPU: tests/cuda_emulation/emulation.h says how they run and what that shows.

The C++ file exports functions of tests/native/calls.h that return emu::guard([&] { ... }); a Library has them as
attributes. What a launch ends with, a deadlock, a diverged warp, an address out of bounds, is internals.EmulationError.
"""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import internals

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests" / "cuda_emulation"
KERNELS = ROOT / "csrc" / "cuda" / "kernels"

Library: TypeAlias = Any  # of internals.load_library


def compile(source: Path, folder: Path, *defines: str, mutate: Callable[[Path], None] | None = None) -> Library:
    """The library of a C++ file over the kernels, or over a copy of them that `mutate` changed."""
    kernels = KERNELS
    if mutate is not None:
        kernels = folder / "kernels"
        shutil.copytree(KERNELS, kernels)
        mutate(kernels)
    out = folder / f"{source.stem}.so"
    flags = ["-std=c++17", "-O2", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-w", "-DSAIL_EMULATE_CUDA"]
    # no TLS wrapper: __shared__ is thread_local, and what `extern __shared__` names needs no constructor
    # -fno-gnu-unique: several libraries are in one process, each with an emulation of its own
    flags += ["-fno-extern-tls-init", "-fno-gnu-unique", "-fPIC", "-shared"]
    includes = [f"-I{p}" for p in (EMULATION, kernels, internals.SOURCES)]
    flags += [f"-D{d}" for d in defines]
    subprocess.run(["g++", *flags, *includes, "-x", "c++", str(source), "-o", str(out)], check=True)
    return internals.load_library(str(out))


def replace_once(path: Path, old: str, new: str) -> None:
    """A mutant's line, which must be there once: else the mutant would be none, or several."""
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} has {text.count(old)} times: {old}"
    path.write_text(text.replace(old, new))
