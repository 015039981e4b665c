"""CMake builds the libraries; this file only drives it and says where they go.

SAIL_OPS_CUDA=AUTO|ON|OFF (AUTO: where nvcc is found and the installed torch is a CUDA build)
SAIL_OPS_CUDA_ARCHS="80;90a" (or TORCH_CUDA_ARCH_LIST="8.0 9.0a")
SAIL_OPS_CUTLASS=OFF|ON (after `pip install --no-deps nvidia-cutlass`)   MAX_JOBS=n   CMAKE_ARGS="..."
"""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def cuda_archs() -> str:
    wanted = os.environ.get("SAIL_OPS_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST") or "80;90a"
    archs = []
    for arch in re.split(r"[;,\s]+", wanted.strip()):
        number = arch.replace("+PTX", "").replace(".", "")
        archs.append("90a" if number == "90" else number)
    return ";".join(dict.fromkeys(archs))


def cuda_wanted() -> tuple[bool, str]:
    """Whether to build the CUDA library, and why: minutes of compiling are for those who can use it."""
    asked = os.environ.get("SAIL_OPS_CUDA", "AUTO").upper()
    if asked not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"SAIL_OPS_CUDA: got {asked!r}, want AUTO, ON or OFF")
    if asked != "AUTO":
        return asked == "ON", f"SAIL_OPS_CUDA={asked}"
    if shutil.which("nvcc") is None:
        return False, "no nvcc on PATH"
    # torch is not to be imported in an isolated build, but pip leaves the outer environment's folder in sysconfig
    version = Path(sysconfig.get_paths()["purelib"]) / "torch" / "version.py"
    if not version.exists():
        return False, "no torch is installed here; SAIL_OPS_CUDA=ON builds it all the same"
    cuda = re.search(r"^cuda\b.*=\s*'([\d.]+)'", version.read_text(), re.M)
    if cuda is None:
        return False, "the installed torch is not a CUDA build; SAIL_OPS_CUDA=ON builds it all the same"
    return True, f"nvcc is here and torch is built for CUDA {cuda[1]}"


class CMakeBuild(build_ext):
    """Configures, builds and installs with CMake; `build/cmake` is kept, so the next build is incremental."""

    def run(self):
        inplace = self.inplace or self.editable_mode
        prefix = ROOT if inplace else Path(self.build_lib).resolve()
        build = ROOT / "build" / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = ["cmake", "-GNinja", "-S", str(ROOT), "-B", str(build)]
        cuda, reason = cuda_wanted()
        print(
            f"sail_ops: CPU library; CUDA library {'for sm_' + cuda_archs() if cuda else 'not built'}: {reason}",
            flush=True,
        )
        configure += [f"-DSAIL_OPS_CUDA={'ON' if cuda else 'OFF'}"]
        configure += [f"-DSAIL_OPS_CUTLASS={os.environ.get('SAIL_OPS_CUTLASS', 'OFF')}"]
        configure += [f"-DCMAKE_PREFIX_PATH={sysconfig.get_paths()['purelib']}/cutlass_library/source"]
        configure += [f"-DSAIL_OPS_CUDA_ARCHS={cuda_archs()}", *os.environ.get("CMAKE_ARGS", "").split()]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(prefix), "--strip"], check=True)

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class AnyPythonWheel(bdist_wheel):
    """No file links libpython, so one wheel serves every Python 3."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("sail_ops._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
