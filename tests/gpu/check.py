"""Everything that needs a card, on a machine without network: python tests/gpu/check.py [--bench-only | --no-bench]

Builds or loads the CUDA library; the accuracy rule over every operator, dtype, gradient and edge; graphs, streams,
memory; compute-sanitizer; the benchmarks, into benchmarks/results/<device>/. Under ten minutes. A folder of wheels
named by SAIL_WHEELS (`make gpu-bundle` gathers them) is put on the path first. Every stage runs; the last line counts.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "sail_ops" / "libsail_ops_cuda.so"
# by families, each in a process of its own: after a bad access nothing works in one
SUITES = {
    "expert layer": ["moe", "moe_training", "grouped_mm", "routing", "activation"],
    "attention": ["attention", "flash_attn"],
    "norms, rotation, loss": ["norm", "layer_norm", "rope", "loss"],
}
SM80_SUITES = ["moe", "moe_training", "attention"]  # that have other kernels on newer cards
BENCHMARKS = ["moe", "attention", "norm", "loss", "step"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-bench", action="store_true")
    parser.add_argument("--bench-only", action="store_true")
    options = parser.parse_args()
    environment = prepare()
    todo = stages(tests=not options.bench_only, benchmarks=not options.no_bench)
    results = {name: run(name, command, environment | extra) for name, (command, extra) in todo.items()}
    for name, (status, seconds) in results.items():
        print(f"{status:8}{seconds:5.0f} s  {name}")
    bad = sum(status == "FAILED" for status, _ in results.values())
    print(f"gpu-check: {len(results) - bad} of {len(results)} stages without a failure")
    return bad


def stages(tests: bool = True, benchmarks: bool = True) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Commands and what they add to the environment, by name."""
    found: dict[str, tuple[list[str], dict[str, str]]] = {"what is built": (python("sail_ops"), {})}
    if tests:
        found |= test_stages() | sanitizer_stages()
    if benchmarks:  # one process a family: the memory of one is not the next one's
        pytest = [*python("pytest"), "--benchmark-only", "-q"]
        found |= {f"benchmark {name}": ([*pytest, f"benchmarks/bench_{name}_cuda.py"], {}) for name in BENCHMARKS}
    return found


def test_stages() -> dict[str, tuple[list[str], dict[str, str]]]:
    """The CPU's suites with every tensor on the card, and what only a card can show."""
    pytest = [*python("pytest"), "-q", "--maxfail=10", "--tb=short", "-p", "no:cacheprovider"]

    def files(suites: list[str]) -> list[str]:
        return [f"tests/test_{suite}.py" for suite in suites]

    on_card = {"SAIL_TEST_DEVICE": "cuda"}
    found = {f"{name}: accuracy, edges, repeats": ([*pytest, *files(s)], on_card) for name, s in SUITES.items()}
    sm80 = on_card | {"SAIL_OPS_CUDA_KERNELS": "sm80"}
    found["the same with the sm_80 kernels"] = [*pytest, *files(SM80_SUITES)], sm80
    found["graphs, streams, memory"] = [*pytest, "tests/test_cuda_device.py"], {}
    if has_cutlass():
        chosen = [*pytest, "tests/test_cuda_device.py", "-k", "grouped_mm"]
        found["grouped_mm by CUTLASS"] = chosen, {"SAIL_OPS_CUDA_KERNELS": "cutlass"}
    return found


def sanitizer_stages() -> dict[str, tuple[list[str], dict[str, str]]]:
    """A step of every operator under three of its tools."""
    found = {}
    for tool in ("memcheck", "racecheck", "initcheck"):
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *sanitizer_options(tool)]
        # torch's own cached blocks would hide what is read past a buffer or before it is written
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found[f"compute-sanitizer {tool}"] = ([*sanitizer, sys.executable, "tests/gpu/small_steps.py"], alone)
    return found


def has_cutlass() -> bool:
    code = "from sail_ops import _library; raise SystemExit(not _library.has_cutlass())"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def sanitizer_options(tool: str) -> list[str]:
    """Our kernels alone: torch's initcheck reports are its own."""
    return ["--kernel-name", "kernel_substring=sail"] if tool != "memcheck" else []


def prepare() -> dict[str, str]:
    """The environment of every stage; builds the library where it is missing."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu-check: torch sees no CUDA device")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if wheels := os.environ.get("SAIL_WHEELS"):
        site = ROOT / "build" / "site"
        install = ["-q", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(site)]
        subprocess.run([*python("pip"), "install", *install, *map(str, Path(wheels).glob("*.whl"))], check=True)
        environment["PYTHONPATH"] += f":{site}"
    if not LIBRARY.exists():
        if not shutil.which("nvcc"):
            sys.exit(f"gpu-check: {LIBRARY} is missing and there is no nvcc to build it")
        setup = [sys.executable, "setup.py", "build_ext", "--inplace"]
        subprocess.run(setup, check=True, cwd=ROOT, env=environment | {"SAIL_OPS_CUDA": "ON"})
    # a checkout that was only unpacked has no metadata (a bundle has), and the report and the results name the version
    if not [*ROOT.glob("sail_ops*.egg-info"), *ROOT.glob("sail_ops*.dist-info")]:
        subprocess.run([sys.executable, "setup.py", "-q", "egg_info"], cwd=ROOT, env=environment, check=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    return environment


def python(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def run(name: str, command: list[str], environment: dict[str, str]) -> tuple[str, float]:
    print(f"==== {name}", flush=True)
    if not shutil.which(command[0]):
        print(f"{command[0]}: not here")
        return "skipped", 0.0
    start = time.monotonic()
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    return "ok" if code == 0 else "FAILED", time.monotonic() - start


if __name__ == "__main__":
    sys.exit(main())
