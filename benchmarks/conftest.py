"""Limits measured once a run, a report at its end; a complete run at full size is kept in results/<device>/."""

import importlib.metadata
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import journal, report
from benchmarks import limits as machine_limits
from benchmarks.cases import size_name
from benchmarks.limits import Limits
from benchmarks.worker import EXACT_MEMORY, HUGE_PAGES, Worker
from sail_ops import _library

# blocks of free pages of this order go back to a virtual machine's host, whose faults then count as ours; 11: none do
PAGE_REPORTING = Path("/sys/module/page_reporting/parameters/page_reporting_order")
HUGE_PAGES_POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LIMITS = pytest.StashKey[Limits]()
PARTIAL = pytest.StashKey[bool]()
ON_CARD = pytest.StashKey[bool]()  # a run names the files of one kind of device: their results go to its folder


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    """One thread at "tiny": its parallel regions are so short that a loaded machine spends its time in barriers."""
    if size_name() == "tiny":
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def limits(pytestconfig: pytest.Config) -> Limits:
    pytestconfig.stash[LIMITS] = machine_limits.measure(size_name())
    return pytestconfig.stash[LIMITS]


@pytest.fixture(scope="session")
def cuda_limits(pytestconfig: pytest.Config) -> Limits:
    pytestconfig.stash[LIMITS] = machine_limits.measure_cuda()
    return pytestconfig.stash[LIMITS]


@pytest.fixture(scope="session")
def huge_page_worker() -> Iterator[Worker]:
    worker = Worker(HUGE_PAGES)
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def memory_worker() -> Iterator[Worker]:
    worker = Worker(EXACT_MEMORY)
    yield worker
    worker.close()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[PARTIAL] = size_name() != "full" or any("::" in argument for argument in config.args)
    config.stash[ON_CARD] = any("_cuda" in argument for argument in config.args)
    if config.stash[ON_CARD] and size_name() == "full":
        journal.start(lambda: header(config))


def header(config: pytest.Config) -> tuple[Path, dict[str, Any]]:
    """Where a run's rows are kept as they come, and what is said of all of them."""
    facts = {key: value for key, value in collect(config).items() if key != "benchmarks"}
    return report.RESULTS / facts["machine_info"]["device"], facts


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A row whose test has passed is whole."""
    outcome: Any = yield
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if outcome.excinfo is None and benchmark is not None and "ms" in benchmark.extra_info:
        journal.write(item.name, benchmark.extra_info, "whole")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A card's files are run by name alone: one family's rows of two devices would be one file of results."""
    return True if collection_path.name.endswith("_cuda.py") and not config.stash[ON_CARD] else None


@pytest.hookimpl(hookwrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    before = len(items)
    yield
    config.stash[PARTIAL] |= len(items) < before  # by -k, -m, --lf


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    results = collect(config)
    if not results["benchmarks"]:
        return
    terminalreporter.write_line(f"\n{report.summary(results)}")
    if exitstatus == 0 and not config.stash[PARTIAL]:
        for path in keep(results):
            terminalreporter.write_line(f"wrote {path.relative_to(report.ROOT)}")


def collect(config: pytest.Config) -> dict[str, Any]:
    """pytest-benchmark's own JSON, as --benchmark-json has it."""
    session: Any = config._benchmarksession  # type: ignore[attr-defined]
    commit = config.hook.pytest_benchmark_generate_commit_info(config=config)
    if (bundled := report.ROOT / "COMMIT").exists():  # tests/gpu/bundle.sh
        commit["id"] = bundled.read_text().strip()
    return config.hook.pytest_benchmark_generate_json(
        config=config,
        benchmarks=session.benchmarks,
        include_data=True,
        machine_info=session.get_machine_info(),
        commit_info=commit,
    )


def keep(results: dict[str, Any]) -> list[Path]:
    """results/<device>/<family>.json for every family that ran, and the chart."""
    folder = report.RESULTS / results["machine_info"]["device"]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for family in sorted({row["extra_info"]["family"] for row in results["benchmarks"]}):
        rows = [row for row in results["benchmarks"] if row["extra_info"]["family"] == family]
        path = folder / f"{family}.json"
        text = json.dumps(
            {**results, "benchmarks": rows}, indent=1, default=vars
        )  # vars: a MoeCase among the parameters
        path.write_text(text + "\n")
        path.with_name(f"{family}{journal.SUFFIX}").unlink(missing_ok=True)
        written.append(path)
        if family == "moe" and "card" not in results["machine_info"]:  # the chart's panels are a CPU's limits
            written.append(report.chart({**results, "benchmarks": rows}, path.with_suffix(".png")))
    return written


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What a reader needs to repeat the run; not the host's name."""
    del machine_info["node"]
    cpu, isa, threads = machine_info["cpu"], _library.cpu_isa(), torch.get_num_threads()
    cpu["flags"] = [flag for flag in cpu.get("flags", []) if flag.startswith(("avx", "amx", "fma"))]
    if isa != (best := _library.cpu_isas()[-1]):  # SAIL_OPS_ISA: another machine's kernels, on this one
        isa = f"{isa}-on-{best}"
    brand = re.sub(r"\W+", "-", cpu.get("brand_raw", machine_info["machine"]).lower())
    machine_info |= {
        "device": f"cpu-{brand}-{isa}-{threads}t",
        "size": size_name(),
        "isa": isa,
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "transparent_hugepage": HUGE_PAGES_POLICY.read_text().strip() if HUGE_PAGES_POLICY.exists() else None,
        "page_reporting_order": PAGE_REPORTING.read_text().strip() if PAGE_REPORTING.exists() else None,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "sail-ops")},
        "limits": config.stash[LIMITS].as_dict() if LIMITS in config.stash else None,
    }
    if config.stash[ON_CARD] and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        machine_info |= {
            "device": "cuda-" + re.sub(r"\W+", "-", card.name.lower()),
            "card": {"name": card.name, "capability": f"{card.major}.{card.minor}", "bytes": card.total_memory},
            "cuda": torch.version.cuda,
            "versions": machine_info["versions"] | installed("triton", "liger-kernel", "flash-attn"),
        }


def installed(*names: str) -> dict[str, str]:
    """Versions of those packages that are here."""
    found = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
