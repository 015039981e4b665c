"""Everything that needs a card, on a machine without network: python tests/gpu/check.py [--bench-only | --no-bench]

Builds or loads the CUDA library; the accuracy rule over every operator, dtype, gradient and edge; graphs, streams,
memory; compute-sanitizer; Triton's kernels; the benchmarks, into benchmarks/results/<device>/. A folder of wheels named
by SAIL_WHEELS (`make gpu-bundle` gathers them) is put on the path first. Without library and nvcc Triton's stages run
alone. Every stage runs, within a time limit; the last line counts, and names what was skipped.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "sail_ops" / "libsail_ops_cuda.so"
CPU_LIBRARY = ROOT / "sail_ops" / "libsail_ops_cpu.so"
# by families, each in a process of its own: after a bad access nothing works in one
SUITES = {
    "expert layer": ["moe", "moe_training", "moe_errors", "grouped_mm", "routing", "activation"],
    "attention": ["attention", "flash_attn"],
    "norms, rotation, loss": ["norm", "layer_norm", "rope", "loss"],
}
SM80_SUITES = ["moe", "moe_training", "attention"]  # that have other kernels on newer cards
# what Triton has; its interpreter runs parts of these files, for the sake of time alone (support/triton_interpreter.py)
TRITON_SUITES = {
    "expert layer": ["moe", "moe_training", "moe_errors"],
    "grouped product, router, gate, norm": ["grouped_mm", "routing", "activation", "norm"],
}
BENCHMARKS = ["moe", "attention", "norm", "loss", "step"]


class Stage(NamedTuple):
    """A process: its command, what it adds to the environment, the module it cannot do without, seconds it may take."""

    command: list[str]
    environment: dict[str, str] = {}
    needs: str = ""
    limit: float = 900


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-bench", action="store_true")
    parser.add_argument("--bench-only", action="store_true")
    options = parser.parse_args(arguments)
    environment, compiled = prepare()
    if compiled:
        todo = stages(tests=not options.bench_only, benchmarks=not options.no_bench)
    else:
        todo = built() | triton_stages()
    results = {name: run(name, stage, environment) for name, stage in todo.items()}
    for name, (status, seconds) in results.items():
        print(f"{status:8}{seconds:5.0f} s  {name}")
    print(verdict({name: status for name, (status, _) in results.items()}, compiled))
    return sum(status == "FAILED" for status, _ in results.values())


def verdict(results: dict[str, str], compiled: bool = True) -> str:
    """The last line."""
    named = {status: [name for name in results if results[name] == status] for status in ("ok", "FAILED", "skipped")}
    text = f"gpu-check: {len(named['ok'])} of {len(results)} stages without a failure"
    for status in ("FAILED", "skipped"):
        if named[status]:
            text += f"; {status}: {', '.join(named[status])}"
    return text if compiled else f"{text}; Triton alone: {LIBRARY.name} is missing and there is no nvcc to build it"


def stages(tests: bool = True, benchmarks: bool = True) -> dict[str, Stage]:
    """By name."""
    found = built()
    if tests:
        found |= test_stages() | sanitizer_stages() | triton_stages()
    if benchmarks:  # one process a family: the memory of one is not the next one's
        pytest = [*python("pytest"), "--benchmark-only", "-q"]
        for name in BENCHMARKS:
            found[f"benchmark {name}"] = Stage([*pytest, f"benchmarks/bench_{name}_cuda.py"], limit=1800)
    return found


def built() -> dict[str, Stage]:
    return {"what is built": Stage(python("sail_ops"))}


def suites(names: list[str]) -> list[str]:
    """pytest over tests/*/test_<name>.py."""
    pytest = [*python("pytest"), "-q", "--maxfail=10", "--tb=short", "-p", "no:cacheprovider"]
    return [*pytest, *(str(next(ROOT.glob(f"tests/*/test_{name}.py")).relative_to(ROOT)) for name in names)]


def test_stages() -> dict[str, Stage]:
    """The CPU's suites with every tensor on the card, and what only a card can show."""
    on_card = {"SAIL_TEST_DEVICE": "cuda"}
    found = {f"{name}: accuracy, edges, repeats": Stage(suites(s), on_card) for name, s in SUITES.items()}
    sm80 = on_card | {"SAIL_OPS_CUDA_KERNELS": "sm80"}
    found["the same with the sm_80 kernels"] = Stage(suites(SM80_SUITES), sm80)
    found["graphs, streams, memory"] = Stage(suites(["cuda_device"]))
    chosen = [*suites(["cuda_device"]), "-k", "accurate or grouped_mm or graph_of_experts"]
    found["experts by clusters"] = Stage(chosen, {"SAIL_OPS_CUDA_KERNELS": "cluster"})
    if has_cutlass():
        chosen = [*suites(["cuda_device"]), "-k", "grouped_mm"]
        found["grouped_mm by CUTLASS"] = Stage(chosen, {"SAIL_OPS_CUDA_KERNELS": "cutlass"})
    return found


def triton_stages() -> dict[str, Stage]:
    """The suites of the operators that Triton has, with its kernels in place of the library's; most of it compiles."""
    on_card = {"SAIL_TEST_DEVICE": "cuda", "SAIL_OPS_TRITON": "1"}
    return {f"Triton, {name}": Stage(suites(s), on_card, "triton", 1800) for name, s in TRITON_SUITES.items()}


def sanitizer_stages() -> dict[str, Stage]:
    """A step of every operator under three of its tools."""
    found = {}
    for tool in ("memcheck", "racecheck", "initcheck"):
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *sanitizer_options(tool)]
        # torch's own cached blocks would hide what is read past a buffer or before it is written
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found[f"compute-sanitizer {tool}"] = Stage([*sanitizer, sys.executable, "tests/gpu/small_steps.py"], alone)
    return found


def has_cutlass() -> bool:
    code = "from sail_ops import _library; raise SystemExit(not _library.has_cutlass())"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def sanitizer_options(tool: str) -> list[str]:
    """Our kernels alone: torch's initcheck reports are its own."""
    return ["--kernel-name", "kernel_substring=sail"] if tool != "memcheck" else []


def prepare() -> tuple[dict[str, str], bool]:
    """The environment of every stage, and whether the CUDA library is there; builds it where it is missing."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu-check: torch sees no CUDA device")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if wheels := os.environ.get("SAIL_WHEELS"):
        site = ROOT / "build" / "site"
        install = ["-q", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(site)]
        subprocess.run([*python("pip"), "install", *install, *map(str, Path(wheels).glob("*.whl"))], check=True)
        environment["PYTHONPATH"] += f":{site}"
    compiled = LIBRARY.exists() or bool(shutil.which("nvcc"))
    if not compiled and not importlib.util.find_spec("triton"):
        sys.exit(f"gpu-check: {LIBRARY} is missing, there is no nvcc to build it, and Triton is not installed")
    if not CPU_LIBRARY.exists() or (compiled and not LIBRARY.exists()):
        setup = [sys.executable, "setup.py", "build_ext", "--inplace"]
        with_cuda = {"SAIL_OPS_CUDA": "ON" if compiled and not LIBRARY.exists() else "OFF"}
        subprocess.run(setup, check=True, cwd=ROOT, env=environment | with_cuda)
    # a checkout that was only unpacked has no metadata (a bundle has), and the report and the results name the version
    if not [*ROOT.glob("sail_ops*.egg-info"), *ROOT.glob("sail_ops*.dist-info")]:
        subprocess.run([sys.executable, "setup.py", "-q", "egg_info"], cwd=ROOT, env=environment, check=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    return environment, compiled


def python(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def run(name: str, stage: Stage, environment: dict[str, str]) -> tuple[str, float]:
    """ok, FAILED or skipped, and the seconds it took; past its limit its whole process group is killed."""
    print(f"==== {name}", flush=True)
    environment = environment | stage.environment
    if not shutil.which(stage.command[0]):
        print(f"{stage.command[0]}: not here")
        return "skipped", 0.0
    imports = [sys.executable, "-c", f"import {stage.needs}"]
    if stage.needs and subprocess.run(imports, env=environment, capture_output=True).returncode:
        print(f"{stage.needs}: not installed")
        return "skipped", 0.0
    start = time.monotonic()
    process = subprocess.Popen(stage.command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(stage.limit)
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped after {stage.limit:.0f} s")
        code = -1
    finally:  # Ctrl-C too: a process group of its own does not hear it
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "ok" if code == 0 else "FAILED", time.monotonic() - start


if __name__ == "__main__":
    sys.exit(main())
