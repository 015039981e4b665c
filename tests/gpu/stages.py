"""What check.py runs, by name and in this order: each stage a process of its own, as after a bad access nothing works
in one."""

import sys
from pathlib import Path
from typing import NamedTuple

from contact import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
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
BENCHMARKS = ["moe", "grouped_mm", "attention", "norm", "loss", "step"]
HAS_CUTLASS = "from sail_ops._library import has_cutlass; raise SystemExit(not has_cutlass())"


class Stage(NamedTuple):
    """A command, what it adds to the environment, Python that it cannot do without, and the seconds it may take."""

    command: list[str]
    environment: dict[str, str] = {}
    needs: str = ""
    limit: float = 900
    measures: bool = False  # it takes --out FILE.jsonl and --budget SECONDS too
    shown: int = 0  # last lines of its output that are for the terminal


def stages(emulated: bool = False, compiled: bool = True) -> dict[str, Stage]:
    """By name. Without a compiled library those of Triton; on the emulator those that know it."""
    built = {"what is built": Stage(python("sail_ops"), limit=60)}
    if not compiled:
        return built | triton_stages()
    first = built | first_stages(emulated)
    if emulated:
        return first | test_stages("emulated")
    return first | test_stages("cuda") | sanitizer_stages() | triton_stages() | benchmark_stages()


def first_stages(emulated: bool) -> dict[str, Stage]:
    """What a card that is there for minutes is for."""
    contact, headlines = [sys.executable, "tests/gpu/contact.py"], python("benchmarks.headlines")
    patience = 1
    if emulated:
        contact, headlines, patience = [*contact, "--emulated"], [*headlines, "--tiny"], PATIENCE
    return {
        "contact": Stage(contact, limit=120 * patience, measures=True, shown=30),
        "headlines": Stage(headlines, limit=150 * patience, measures=True, shown=45),
    }


def suites(names: list[str]) -> list[str]:
    """pytest over tests/*/test_<name>.py."""
    pytest = [*python("pytest"), "-q", "--maxfail=10", "--tb=short", "-p", "no:cacheprovider"]
    return [*pytest, *(str(next(ROOT.glob(f"tests/*/test_{name}.py")).relative_to(ROOT)) for name in names)]


def test_stages(device: str) -> dict[str, Stage]:
    """The CPU's suites with every tensor on the card, and what only a card can show."""
    on_card = {"SAIL_TEST_DEVICE": device}
    found = {f"{name}: accuracy, edges, repeats": Stage(suites(s), on_card) for name, s in SUITES.items()}
    sm80 = on_card | {"SAIL_OPS_CUDA_KERNELS": "sm80"}
    found["the same with the sm_80 kernels"] = Stage(suites(SM80_SUITES), sm80)
    found["graphs, streams, memory"] = Stage(suites(["cuda_device"]))
    chosen = [*suites(["cuda_device"]), "-k", "accurate or grouped_mm or graph_of_experts"]
    found["experts by clusters"] = Stage(chosen, {"SAIL_OPS_CUDA_KERNELS": "cluster"})
    chosen = [*suites(["cuda_device"]), "-k", "grouped_mm"]
    found["grouped_mm by CUTLASS"] = Stage(chosen, {"SAIL_OPS_CUDA_KERNELS": "cutlass"}, HAS_CUTLASS)
    return found


def sanitizer_stages() -> dict[str, Stage]:
    """A step of every operator under three of its tools."""
    found = {}
    for tool in ("memcheck", "racecheck", "initcheck"):
        # our kernels alone: torch's initcheck reports are its own
        options = ["--kernel-name", "kernel_substring=sail"] if tool != "memcheck" else []
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *options]
        # torch's own cached blocks would hide what is read past a buffer or before it is written
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found[f"compute-sanitizer {tool}"] = Stage([*sanitizer, sys.executable, "tests/gpu/small_steps.py"], alone)
    return found


def triton_stages() -> dict[str, Stage]:
    """The suites of the operators that Triton has, with its kernels in place of the library's; most of it compiles."""
    on_card = {"SAIL_TEST_DEVICE": "cuda", "SAIL_OPS_TRITON": "1"}
    return {f"Triton, {name}": Stage(suites(s), on_card, "import triton", 1800) for name, s in TRITON_SUITES.items()}


def benchmark_stages() -> dict[str, Stage]:
    """One process a family: the memory of one is not the next one's."""
    pytest = [*python("pytest"), "--benchmark-only", "-q"]
    files = {name: f"benchmarks/bench_{name}_cuda.py" for name in BENCHMARKS}
    found = {f"benchmark {name}": Stage([*pytest, file], limit=1800) for name, file in files.items()}
    # five minutes; beside all others its results find no room in DIR, so it is for a run of its own (--only training)
    training = Stage([*pytest, "benchmarks/bench_training_cuda.py"], needs="import deepspeed", limit=600)
    return found | {"benchmark training": training}


def python(module: str) -> list[str]:
    return [sys.executable, "-m", module]
