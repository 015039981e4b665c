"""A loader's memory does not grow with its data: 100 MB for 10^6 records is what it may take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import loader_memory
import pytest

BYTES_A_RECORD = 100


@pytest.mark.skipif(sys.platform != "linux", reason="PSS is Linux's")
def test_memory_of_many_records(tmp_path: Path) -> None:
    small, large = 10_000, 200_000
    for count in (small, large):
        loader_memory.write_records(tmp_path / f"{count}.jsonl", count)
    # the first is a warm-up, of what is loaded on first use
    names = [str(tmp_path / f"{count}.jsonl") for count in (small, small, large)]
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, loader_memory.__file__, *names]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, run.stderr
    _, few, many = json.loads(run.stdout.splitlines()[-1])
    assert (few["records"], many["records"]) == (small, large)
    assert many["index_bytes"] < 8 * large + 1000
    assert many["bytes"] - few["bytes"] <= BYTES_A_RECORD * (large - small)
