"""Collects bench_*.py, measures the limits once a run, and ends with the report; a complete run is kept in results/."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks import limits as machine_limits, report
from benchmarks.cases import size_name
from benchmarks.limits import Limits
from benchmarks.worker import EXACT_MEMORY, HUGE_PAGES, Worker


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    """One thread at "tiny": its parallel regions are so short that a loaded machine spends its time in barriers."""
    if size_name() == "tiny":
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def limits() -> Limits:
    return machine_limits.measure(size_name())


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


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = [row.as_dict(include_data=False) for row in config._benchmarksession.benchmarks if not row.has_error]
    terminalreporter.write_line("")
    terminalreporter.write_line(report.summary(rows))
