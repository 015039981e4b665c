"""Fragments of weights and optimizer state: a disk that is full, and going back to a checkpoint within a run."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from training.engines import fragments
from training.engines.fragments import Fragment

WORKER = Path(__file__).parents[1] / "support/reload_worker.py"
LIMIT = 100_000  # bytes of a file


@pytest.fixture
def small_files() -> Iterator[None]:
    """Writing past LIMIT fails, as on a full disk."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_is_an_oserror(tmp_path: Path, small_files: None) -> None:
    held: Any = [Fragment("w", 0, {fragments.WEIGHT: torch.zeros(LIMIT)})]
    with pytest.raises(OSError, match=r"rank-00000-of-00001\.safetensors: .*too large"):
        fragments.write(tmp_path, held, rank=0, world=1)


@pytest.mark.slow
def test_zero_3_goes_back_within_a_run_as_it_resumes(tmp_path: Path) -> None:
    """Small parameters stay gathered between steps: a load that leaves these takes one step with other weights."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SAIL_TRAINING_TIMEOUT": "60"}
    subprocess.run([*launcher, str(WORKER), str(tmp_path)], env=environment, check=True, timeout=120)
    found = json.loads((tmp_path / "losses.json").read_text(encoding="utf-8"))
    assert len(set(found["went on"])) == 3
    assert found["went back"] == found["went on"] == found["resumed"]
