"""Compiles sources for one instruction set, with the commands of the build, for tests that look inside the library.

The build folder stays after `pip install -e .`; SAIL_OPS_BUILD_DIR names another one.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("SAIL_OPS_BUILD_DIR") or ROOT / "build" / "cmake")
KERNELS = "csrc/cpu/kernels"


def require_build() -> None:
    library = BUILD / "libsail_ops_cpu.so"
    if not library.exists():
        pytest.skip(f"{BUILD} is gone: build with `pip install -e .` in the source folder to run this test")
    newest = max(p.stat().st_mtime for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h"))
    if newest > library.stat().st_mtime:
        pytest.fail(f"{BUILD} is older than csrc: build with `pip install -e .` in the source folder")


def copy_sources(folder: Path) -> Path:
    """A copy of csrc/ to change; returns its parent."""
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("cuda", "ascend"))
    return folder


def compile_kernel(source: Path, isa: str, out: Path, *more: str) -> None:
    """Compiles `source` as the build compiles the kernel norm.cpp for `isa`."""
    command = _command(isa, f"{KERNELS}/norm.cpp")
    subprocess.run([*command, *more, "-o", str(out), "-c", str(source)], check=True, cwd=BUILD)


def compile_as_built(source: Path, isa: str, out: Path, *more: str) -> None:
    """Compiles a changed copy of one of the build's own sources; isa "" for those compiled once."""
    command = _command(isa, f"cpu/{'kernels/' if isa else ''}{source.name}")
    subprocess.run([*command, *more, "-o", str(out), "-c", str(source)], check=True, cwd=BUILD)


def functions_that_differ(objects: Iterable[Path]) -> dict[str, set[str]]:
    """Inline functions of ours of which objects hold copies of several sizes: the linker keeps any one of them."""
    sizes: dict[str, set[str]] = {}
    for file in objects:
        listed = subprocess.run(["nm", "-C", "-S", "--defined-only", str(file)], capture_output=True, text=True)
        for size, name in re.findall(r"^\w+ (\w+) W (sail::.*)$", listed.stdout, re.M):
            sizes.setdefault(name, set()).add(size)
    return {name: found for name, found in sizes.items() if len(found) > 1}


def link(objects: list[Path], out: Path) -> None:
    torch_stubs = ["-Wl,--no-as-needed", f"-L{BUILD}/stubs", "-ltorch", "-ltorch_cpu"]
    command = [_compiler(), "-shared", "-fopenmp", "-o", str(out), *map(str, objects), *torch_stubs]
    subprocess.run(command, check=True)


def link_with(replaced: dict[tuple[str, str], Path], out: Path) -> None:
    """The CPU library from the build's objects, those of {(kernel source, isa): object} replaced."""
    objects, others = [], (".cu", "empty.cpp", "cmake_pch.hxx.cxx")
    for entry in _commands():
        if f"{ROOT.name}/csrc/cuda" in entry["file"] or entry["file"].endswith(others):
            continue
        words = shlex.split(entry["command"])
        built = BUILD / words[words.index("-o") + 1]
        isa = next((w.removeprefix("-DSAIL_ISA=") for w in words if w.startswith("-DSAIL_ISA=")), "")
        objects.append(replaced.get((Path(entry["file"]).name, isa), built))
    link(objects, out)


def _commands() -> list[dict[str, str]]:
    return json.loads((BUILD / "compile_commands.json").read_text())


def _command(isa: str, source: str) -> list[str]:
    for entry in _commands():
        words = shlex.split(entry["command"])
        flags = [w for w in words if w.startswith("-DSAIL_ISA=")]
        if entry["file"].endswith(source) and flags == ([f"-DSAIL_ISA={isa}"] if isa else []):
            if "-include" in words:  # the precompiled header: a changed copy has headers of its own
                del words[(i := words.index("-include")) : i + 2]
            return words[: words.index("-o")]
    raise LookupError(f"the build compiles no {source} for {isa}")


def _compiler() -> str:
    match = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", (BUILD / "CMakeCache.txt").read_text(), re.M)
    assert match
    return match[1]
