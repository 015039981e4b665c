"""Native internals in one pybind11 module, tests/native/module.cpp: structures, plans, and the functions of libraries.

`internals.RowsProblem(a=.., E=.., ...)` is the structure of that name in csrc, `internals.plan_sort(..)` the function,
and `internals.load_library(path).store_rows(..)` what a compiled file exports as tests/native/calls.h declares it.
Tensors are passed where there are pointers. The product itself is bound to torch without pybind11.
"""

import importlib.util
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import pytest
from compiled import FOLDER, digest, run

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tests" / "native"
EMULATION = ROOT / "tests" / "cuda_emulation"
KERNELS = ROOT / "csrc" / "cuda" / "kernels"


def _build() -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here")
    headers = [p for folder in (SOURCES, EMULATION, KERNELS) for p in folder.iterdir() if p.suffix in (".h", ".cuh")]
    made_of = digest(SOURCES / "module.cpp", *sorted(headers), Path(__file__))
    out = FOLDER / f"sail_internals_{made_of}_{pybind11.__version__}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not out.exists():
        FOLDER.mkdir(exist_ok=True)
        # -O0: it calls, and computes nothing
        flags = [
            "-std=c++17",
            "-O0",
            "-fPIC",
            "-shared",
            "-fvisibility=hidden",
            "-fno-gnu-unique",
            "-DSAIL_EMULATE_CUDA",
        ]
        include = [SOURCES, EMULATION, KERNELS, pybind11.get_include(), sysconfig.get_paths()["include"]]
        run(out, compiler, *flags, *(f"-I{p}" for p in include), str(SOURCES / "module.cpp"))
    return out


@cache
def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sail_internals", _build())
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def __getattr__(name: str) -> Any:
    """Compiled where a test first asks for something."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(_load(), name)
