"""The one launcher of the CUDA library, on the emulated card: grids, clusters, shared memory, what is refused."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from emulated import EMULATION, ROOT

pytestmark = [pytest.mark.cpu_only, pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here")]

REFUSED = "sail_ops.norm: CUDA: invalid value; then no error"
SAID = {
    "plain": "3 blocks, 96 threads",
    "rows": "6 blocks, 192 threads",
    "clusters": "4 blocks, 128 threads",
    "half of a cluster": REFUSED,
    "asked for": "1 blocks, 32 threads",
    "too much": REFUSED,
    "nothing": REFUSED,
    "too many": "sail_ops.norm: more than 2^31 - 1 blocks; then no error",
    "side by side": "1 2 3 0",
    "apart": "1 3 5 0",
    "one for all": "1 1 1 0",
}


def test_launches_and_copies(tmp_path: Path) -> None:
    """A refusal throws, naming the operator, and leaves no error behind for torch's next check."""
    include = [f"-I{p}" for p in (EMULATION / "host", EMULATION, ROOT / "csrc" / "cuda")]
    source, program = ROOT / "tests" / "support" / "launcher.cpp", tmp_path / "launcher"
    flags = ["-std=c++17", "-DSAIL_EMULATE_CUDA", "-U_FORTIFY_SOURCE", "-fno-extern-tls-init"]
    subprocess.run(["g++", *flags, *include, str(source), "-o", str(program)], check=True)
    environment = os.environ | {"SAIL_EMULATED_CARD": f"9.0 4 {64 * 1024}"}
    done = subprocess.run([str(program)], env=environment, capture_output=True, text=True, check=True)
    assert dict(line.split(": ", 1) for line in done.stdout.splitlines()) == SAID
