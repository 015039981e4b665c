"""What tests compile, each once: results are kept in a folder of the machine, by what went into them."""

import fcntl
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(tempfile.gettempdir()) / f"sail_ops_tests_{os.getuid()}"


def digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in files)).hexdigest()[:16]


def run(out: Path, *command: str) -> None:
    """`command -o out` where there is no such file: one process makes it whole, another that wants it waits."""
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            part = out.with_suffix(".part")
            subprocess.run([*command, "-o", str(part)], check=True)
            part.rename(out)
