"""Do the tests of the CUDA sources see a broken one? Each mutant changes one line of csrc/cuda; its check must fail.

python cuda_mutants.py MODULE: what the checks of MODULE.MUTANTS said, as JSON; in a process of its own, as every
library takes the place of the one before under torch's CUDA key.
"""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import emulated_library
from emulated import replace_once


class Mutant(NamedTuple):
    """In `file`, below csrc/cuda, `old` becomes `new`."""

    file: str
    old: str
    new: str
    check: Callable[[], None]


def failures(module: str) -> dict[str, str]:
    """By mutant: what its check said, nothing if it passed; under "none" what the checks say of the sources' own."""
    command = [sys.executable, __file__, module]
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tests / 'cuda'}:{tests}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _copy(folder: Path, mutant: Mutant) -> Path:
    for part in ("cuda", "torch"):
        shutil.copytree(emulated_library.ROOT / "csrc" / part, folder / "csrc" / part)
    replace_once(folder / "csrc" / "cuda" / mutant.file, mutant.old, mutant.new)
    return folder


def _said(check: Callable[[], None], root: Path, only: tuple[str, ...]) -> str:
    try:
        with emulated_library.emulated(root, only):
            check()
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def main(module: str) -> dict[str, str]:
    mutants: dict[str, Mutant] = import_module(module).MUTANTS
    only: tuple[str, ...] = import_module(module).SOURCES
    checks = dict.fromkeys(m.check for m in mutants.values())
    said = {"none": "".join(_said(check, emulated_library.ROOT, only) for check in checks)}
    with TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        roots = [_copy(Path(folder) / str(i), m) for i, m in enumerate(mutants.values())]
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda root: emulated_library.build(root, only), roots))
        for (name, mutant), root in zip(mutants.items(), roots, strict=True):
            said[name] = _said(mutant.check, root, only)
            shutil.rmtree(root)
    return said


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
