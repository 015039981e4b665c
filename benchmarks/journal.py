"""Rows of a run on a card as they come, in results/<device>/<family>.partial.jsonl: what a run that is killed leaves.

A file begins with the machine; each row is a line, written as soon as ours was timed and again when it is whole. The
results of a whole run take its place (conftest.keep), and only they are a family's results.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.tables import Row

SUFFIX = ".partial.jsonl"
_header: Callable[[], tuple[Path, Row]] | None = None
_begun: dict[str, Path] = {}


def start(header: Callable[[], tuple[Path, Row]] | None) -> None:
    """From now on rows are kept: in the folder that `header` returns, below its facts. None: no longer."""
    global _header
    _header = header
    _begun.clear()


def write(name: str, info: Row, state: str) -> None:
    """A row by its test's name, on disk when this returns; `state`: "ours alone", "in part" or "whole"."""
    if _header is None:
        return
    family = info["family"]
    if family not in _begun:
        folder, facts = _header()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{family}{SUFFIX}"
        path.write_text(line(partial=True, **facts))
        _begun[family] = path
    with _begun[family].open("a", encoding="utf-8") as file:
        file.write(line(name=name, state=state, extra_info=info))


def line(**facts: Any) -> str:
    return json.dumps(facts, default=vars) + "\n"  # vars: a MoeCase


def read(path: Path) -> Row:
    """As the results of a whole run, but `partial`: of each row its last line. The file's last may be half a line."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    if not lines:
        return {"partial": True, "benchmarks": []}
    rows = {row["name"]: row for row in lines[1:]}
    return {**lines[0], "benchmarks": list(rows.values())}
