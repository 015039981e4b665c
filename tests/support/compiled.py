"""What tests compile, each once: results are kept in a folder of the machine, by what went into them."""

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(tempfile.gettempdir()) / f"sail_ops_tests_{os.getuid()}"


def digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in files)).hexdigest()[:16]


def run(out: Path, *command: str) -> None:
    """`command -o out`, so that another process never sees half a file."""
    part = out.with_suffix(f".{os.getpid()}")
    subprocess.run([*command, "-o", str(part)], check=True)
    part.rename(out)
