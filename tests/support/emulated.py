"""Compiles CUDA kernels for the CPU: tests/cuda_emulation/emulation.h says how they run and what that shows.

The C++ file exports functions that return emu::guard([&] { ... }); a Library calls them with tensors, numbers,
sequences of integers, and None for a null pointer.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests" / "cuda_emulation"
KERNELS = ROOT / "csrc" / "cuda" / "kernels"


class EmulationError(AssertionError):
    """What a launch ended with: a deadlock, a diverged warp, an address out of bounds."""


def compile(source: Path, folder: Path, *defines: str, mutate: Callable[[Path], None] | None = None) -> "Library":
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
    includes = [f"-I{EMULATION}", f"-I{kernels}"]
    flags += [f"-D{d}" for d in defines]
    subprocess.run(["g++", *flags, *includes, "-x", "c++", str(source), "-o", str(out)], check=True)
    return Library(out)


def replace_once(path: Path, old: str, new: str) -> None:
    """A mutant's line, which must be there once: else the mutant would be none, or several."""
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} has {text.count(old)} times: {old}"
    path.write_text(text.replace(old, new))


class Library:
    """Calls exported functions that return const char*: a launch that failed is an EmulationError."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def __call__(self, name: str, *arguments: Tensor | int | float | Sequence[int] | None) -> None:
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        error = function(*map(_argument, arguments))
        if error is not None:
            raise EmulationError(error.decode())

    def number(self, name: str, *arguments: int) -> int:
        """What a function that returns int64_t says."""
        function = getattr(self._library, name)
        function.restype = ctypes.c_int64
        return int(function(*map(_argument, arguments)))


def _argument(value: Tensor | int | float | Sequence[int] | None) -> object:
    """Tensors as pointers, integers as int64_t, floats as double, sequences of integers as const int64_t*."""
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_double(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return (ctypes.c_int64 * len(value))(*value)
