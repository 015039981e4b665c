"""What was built: libraries for any torch >= 2.11, any Python, any machine that has one of their instruction sets."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import native
import pytest
import setuptools
import torch

import sail_ops
from sail_ops import _library, testing
from sail_ops._backends import has_kernel, operators

ROOT = Path(__file__).resolve().parents[2]
GXX = shutil.which("g++")
needs_gxx = pytest.mark.skipif(GXX is None, reason="no g++ here")
needs_binutils = pytest.mark.skipif(not shutil.which("readelf") or not shutil.which("nm"), reason="no binutils here")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT)


def library(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path.name} is not built")
    return path


LIBRARIES = pytest.mark.parametrize("path", [_library.CPU_LIBRARY, _library.CUDA_LIBRARY], ids=lambda path: path.stem)


# -- python -m sail_ops


def test_report_names_every_operator_and_the_instruction_set():
    report = run(sys.executable, "-m", "sail_ops", SAIL_OPS_ISA="generic").stdout
    assert "in use: generic (SAIL_OPS_ISA=generic)" in report
    for name in operators():
        assert re.search(rf"^{name} +generic ", report, re.M), report
    for isa in testing.cpu_isas():
        assert isa in report


def test_report_refuses_an_instruction_set_that_is_not_there():
    report = run(sys.executable, "-m", "sail_ops", SAIL_OPS_ISA="sse9")
    assert report.returncode == 1
    assert "got 'sse9'" in report.stdout and testing.cpu_isas()[-1] in report.stdout


def test_every_operator_runs_on_the_cpu():
    assert "rms_norm" in operators()
    assert [name for name in operators() if not has_kernel(name, "CPU")] == []


# -- the stable C shim


@needs_gxx
@pytest.mark.parametrize("wrong", [False, True], ids=["ours", "wrong-signature"])
def test_our_declarations_are_torchs(wrong: bool):
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++17", "-fsyntax-only", f"-I{include}"] + ["-DSAIL_WRONG_SIGNATURE"] * wrong
    result = run(str(GXX), *flags, str(ROOT / "tests" / "support" / "abi_check.cpp"))
    assert (result.returncode != 0) == wrong, result.stderr
    assert not wrong or "aoti_torch_get_dim" in result.stderr


# -- the binaries


@needs_binutils
@LIBRARIES
def test_library_needs_only_what_every_machine_has(path: Path):
    dynamic = run("readelf", "--dynamic", "--wide", str(library(path))).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+?)\.so", dynamic))
    allowed = {"libtorch", "libtorch_cpu", "libstdc++", "libgcc_s", "libgomp", "libm", "libc", "ld-linux-x86-64"}
    assert needed <= allowed | ({"libtorch_cuda"} if "cuda" in path.name else set())
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


@needs_binutils
@LIBRARIES
def test_library_runs_on_older_systems(path: Path):
    """Ubuntu 22.04 and Debian 12, and no Python at all."""
    symbols = run("nm", "--dynamic", "--undefined-only", str(library(path))).stdout
    for name, newest in {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13)}.items():
        versions = {tuple(map(int, v.split("."))) for v in re.findall(rf"@{name}_([0-9.]+)", symbols)}
        assert max(versions, default=(0,)) <= newest
    assert not re.search(r" _?Py[A-Z_]", symbols)


@needs_binutils
@pytest.mark.parametrize("isa", testing.cpu_isas())
def test_kernel_objects_hold_no_shared_code(isa: str):
    """The linker keeps one copy of a weak symbol: of a std template it could be the AVX-512 one, for every caller."""
    objects = list((ROOT / "build" / "cmake" / "CMakeFiles" / f"sail_cpu_{isa}.dir").rglob("*.o"))
    if not objects:
        pytest.skip("built elsewhere: the object files are not in build/cmake")
    for file in objects:
        symbols = run("nm", "--demangle", "--defined-only", str(file)).stdout.splitlines()
        weak = [line for line in symbols if re.search(r"^\S* [VWu] ", line)]
        assert [line for line in weak if f"sail::cpu::{isa}::" not in line] == [], file.name


TWO_OF_A_NAME = {
    "one.cpp": "namespace sail { struct Rows { long n = 0; long count() const { return n; } }; }\n"
    "long first() { return sail::Rows().count(); }\n",
    "two.cpp": "namespace sail { struct Rows { long m[4] = {}; long count() const { return m[1] + m[3]; } }; }\n"
    "long second() { return sail::Rows().count(); }\n",
}


@needs_gxx
@needs_binutils
def test_host_objects_agree_on_inline_functions(tmp_path: Path):
    """Two types of one name are one to the linker: without optimization, each calls the other's functions."""
    native.require_build()
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    objects = [tmp_path / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # unoptimized, so that nothing is inlined
        list(threads.map(lambda source, out: native.compile_as_built(source, "", out, "-O0"), sources, objects))
    assert len(objects) > 8 and native.functions_that_differ(objects) == {}
    for name, text in TWO_OF_A_NAME.items():
        (tmp_path / name).write_text(text)
        run(str(GXX), "-O0", "-c", str(tmp_path / name), "-o", str(tmp_path / f"{name}.o"))
    found = native.functions_that_differ(tmp_path / f"{name}.o" for name in TWO_OF_A_NAME)
    assert "sail::Rows::count() const" in found


def test_one_openmp_runtime():
    """Two would each start their threads on the same cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    sail_ops.rms_norm(torch.ones(2, 8), torch.ones(8))
    files = {line.split()[-1] for line in maps.read_text().splitlines() if re.search(r"lib(gomp|omp|iomp5)\b", line)}
    assert len(files) == 1, files


def test_a_library_of_other_sources_says_what_to_do() -> None:
    with pytest.raises(ImportError, match="built from other sources .it has no sail_cpu_of_tomorrow.; build it again"):
        _library._load(_library.CPU_LIBRARY, sail_cpu_of_tomorrow=bytes)


# -- the CUDA library, as far as a machine without a card can tell

CUDA_PROBE = """
import torch, sail_ops
from sail_ops import _library
from sail_ops._backends import LINEAR, has_kernel, operators
torch.ops.load_library(str(_library.CUDA_LIBRARY))
assert {name for name in operators() if not has_kernel(name, "CUDA")} == set(LINEAR)
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
rms_norm = torch.ops.sail_ops.rms_norm.default
print(rms_norm.redispatch(cuda, torch.ones(0, 8), torch.ones(8), 1e-6).shape)
for x, weight in [((2, 8), 7), ((2, 0), 0)]:
    try:
        rms_norm.redispatch(cuda, torch.ones(x), torch.ones(weight), 1e-6)
    except ValueError as error:
        print(error)
"""


@needs_gxx
def test_cuda_library_loads_registers_and_checks(tmp_path: Path):
    """With an empty stand-in for libtorch_cuda: its host code runs up to the launch, which only a card can do."""
    library(_library.CUDA_LIBRARY)
    header = (ROOT / "csrc/torch/stable_abi_cuda.h").read_text()
    functions = re.findall(r"AOTITorchError (aoti_torch_\w+)\(", header)
    source = "".join(f'extern "C" int {name}() {{ return 1; }}\n' for name in functions)
    (tmp_path / "cuda.cpp").write_text(source)
    stand_in = str(tmp_path / "libtorch_cuda.so")
    built = run(
        str(GXX), "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", str(tmp_path / "cuda.cpp"), "-o", stand_in
    )
    assert built.returncode == 0, built.stderr
    probe = run(sys.executable, "-c", CUDA_PROBE, LD_LIBRARY_PATH=str(tmp_path))
    assert probe.returncode == 0, probe.stderr
    shape, wrong_weight, no_columns = probe.stdout.splitlines()
    assert shape == "torch.Size([0, 8])"
    assert wrong_weight == "sail_ops.rms_norm: weight_D: got shape [7], expected shape [8]"
    assert no_columns == "sail_ops.rms_norm: x: got D = 0, expected D >= 1"


@pytest.mark.parametrize(
    ("variable", "value", "archs"),
    [
        ("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX", "80;90a"),
        ("TORCH_CUDA_ARCH_LIST", "9.0a", "90a"),
        ("SAIL_OPS_CUDA_ARCHS", "80", "80"),
        ("SAIL_OPS_CUDA_ARCHS", "", "80;90a"),
    ],
)
def test_cuda_archs_from_the_environment(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, archs: str):
    for name in ("TORCH_CUDA_ARCH_LIST", "SAIL_OPS_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    assert runpy.run_path(str(ROOT / "setup.py"))["cuda_archs"]() == archs


CUDA_TORCH, CPU_TORCH = "cuda: Optional[str] = '13.0'\n", "cuda: Optional[str] = None\n"


@pytest.mark.parametrize(
    ("asked", "nvcc", "torch_version", "wanted", "reason"),
    [
        (None, True, CUDA_TORCH, True, "torch is built for CUDA 13.0"),
        (None, True, CPU_TORCH, False, "not a CUDA build"),
        (None, True, None, False, "no torch is installed here"),
        (None, False, CUDA_TORCH, False, "no nvcc on PATH"),
        ("ON", False, None, True, "SAIL_OPS_CUDA=ON"),
        ("off", True, CUDA_TORCH, False, "SAIL_OPS_CUDA=OFF"),
    ],
)
def test_cuda_is_built_for_those_who_can_use_it(
    asked: str | None, nvcc: bool, torch_version: str | None, wanted: bool, reason: str, tmp_path: Path, monkeypatch
):
    (tmp_path / "torch").mkdir()
    if torch_version is not None:
        (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.13.0'\n{torch_version}hip = None\n")
    monkeypatch.delenv("SAIL_OPS_CUDA", raising=False)
    if asked is not None:
        monkeypatch.setenv("SAIL_OPS_CUDA", asked)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    made = runpy.run_path(str(ROOT / "setup.py"))["cuda_wanted"]
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/nvcc" if nvcc else None)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    got, why = made()
    assert got == wanted and reason in why
    monkeypatch.setenv("SAIL_OPS_CUDA", "maybe")
    with pytest.raises(SystemExit, match="SAIL_OPS_CUDA: got 'MAYBE', want AUTO, ON or OFF"):
        made()


# -- what README shows


def test_readme_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 2
    for code in blocks:
        exec(code.replace("512, 2048, 768, 128, 8", "32, 64, 32, 16, 4"), {})
