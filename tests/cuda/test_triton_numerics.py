"""The operators' own tests on Triton's kernels, in Triton's interpreter: accuracy, gradients, edges, errors."""

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: `pip install --no-deps -c constraints.txt triton`")
pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
FILES = ("moe", "moe_training", "grouped_mm", "norm", "routing", "activation", "moe_errors")


def run(name: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{TESTS}/support:{TESTS.parent}:{os.environ.get('PYTHONPATH', '')}"}
    quick = [sys.executable, "-m", "pytest", "-q", "-p", "triton_interpreter", "--quick"]
    command = [*quick, f"{TESTS}/ops/test_{name}.py"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs() -> dict[str, Future[subprocess.CompletedProcess[str]]]:
    threads = ThreadPoolExecutor(2)
    started = {name: threads.submit(run, name) for name in FILES}
    threads.shutdown(wait=False)
    return started


@pytest.mark.parametrize("name", FILES)
def test_file_passes_on_triton(runs: dict, name: str) -> None:
    done = runs[name].result()
    assert not done.returncode, done.stdout[-5000:] + done.stderr[-2000:]
