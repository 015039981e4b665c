"""What check.py leaves: DIR/results.jsonl, DIR/log.txt, DIR/<family>.json of the benchmarks, and few lines on the
terminal. Each line of results.jsonl is whole as soon as it is there, so that a run that is killed has what it found:

    {"run": {...}}, {"device": ...}                  first: commit, arguments, versions; the card
    {"stage": S, "status": ..., "partial": ...}      a stage has ended; partial: it was cut short or has not run
    {"stage": S, "partial": ..., **measurement}      what it measured
    {"verdict": "...", "partial": ...}               last; without it the run was killed
"""

import json
import shutil
from pathlib import Path
from typing import Any

MOST_FILES = 8  # in DIR
TERMINAL, RESERVE, WIDTH = 11_500, 1_500, 160  # characters in all, of those the last lines', and of a line
LOG = 512 << 10  # bytes of a stage's output that the log keeps
TAIL = 8  # lines of a stage that failed
STATUSES = ("ok", "FAILED", "timed out", "interrupted", "skipped", "no time left", "not run")
CUT_SHORT = ("timed out", "interrupted", "no time left", "not run")


class Report:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.results, self.log = folder, folder / "results.jsonl", folder / "log.txt"
        for path in (self.results, self.log):
            path.write_text("")
        self.statuses: dict[str, str] = {}
        self._left = TERMINAL

    def say(self, text: str, last: bool = False) -> None:
        """On the terminal, as long as that has room; `last`: what room is kept for."""
        for line in text.splitlines():
            line = line if last or len(line) <= WIDTH else line[: WIDTH - 3] + "..."
            if self._left - len(line) - 1 < (0 if last else RESERVE):
                return
            self._left -= len(line) + 1
            print(line, flush=True)

    def record(self, **line: Any) -> None:
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def ended(self, stage: str, status: str, seconds: float = 0.0, limit: float = 0.0, reason: str = "") -> None:
        """A stage has the status, and on the terminal a line."""
        self.statuses[stage] = status
        partial = status in CUT_SHORT
        times = {"seconds": round(seconds, 1), "limit": round(limit, 1)}
        self.record(stage=stage, status=status, **times, partial=partial, reason=reason)
        self.say(f"{status:12} {seconds:5.0f} s  {stage}{': ' if reason else ''}{reason}")

    def measured(self, stage: str, path: Path, partial: bool) -> None:
        """Takes in the lines that the stage wrote; the last may be half a line."""
        for text in path.read_text().splitlines() if path.exists() else ():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                line = {"unreadable": text[:500]}
            self.record(stage=stage, **{"partial": partial} | line)
        path.unlink(missing_ok=True)

    def begin(self, title: str) -> int:
        """Where in the log the output of what is now to run begins."""
        with self.log.open("a") as file:
            file.write(f"{title}\n")
        return self.log.stat().st_size

    def output(self, begin: int, lines: int) -> str:
        """The last lines of the log after byte `begin`."""
        with self.log.open("rb") as file:
            file.seek(max(begin, self.log.stat().st_size - 20_000))
            text = file.read().decode(errors="replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:] if lines else [])

    def trim(self, begin: int) -> None:
        """Of a stage that wrote more than the log keeps: its beginning and its end."""
        size = self.log.stat().st_size - begin
        if size <= LOG:
            return
        with self.log.open("r+b") as file:
            file.seek(-LOG // 2, 2)
            end = file.read()
            file.seek(begin + LOG // 2)
            file.write(f"\n[{size - LOG} bytes left out]\n".encode() + end)
            file.truncate()

    def keep(self, paths: list[Path]) -> None:
        """Copies of the benchmarks' results, as many as the folder may hold."""
        for path in paths:
            copy = self.folder / path.name
            if copy.exists() or len(list(self.folder.iterdir())) < MOST_FILES:
                shutil.copyfile(path, copy)
            else:
                self.say(f"no room in {self.folder} for {path.name}")

    def verdict(self, silent_after: str = "", note: str = "") -> str:
        """Recorded and said: how many stages are well, and the names of the others."""
        of = {status: [n for n, s in self.statuses.items() if s == status] for status in STATUSES}
        text = f"gpu-check: {len(of['ok'])} of {len(self.statuses)} stages without a failure"
        text += "".join(f"; {status}: {', '.join(of[status])}" for status in STATUSES[1:] if of[status])
        text += f"; the card does not answer after: {silent_after}" if silent_after else ""
        text += f"; {note}" if note else ""
        partial = any(of[status] for status in CUT_SHORT)
        self.record(verdict=text, partial=partial)
        self.say(text, last=True)
        return text
