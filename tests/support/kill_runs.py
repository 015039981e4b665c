"""`python tests/support/kill_runs.py --moments 30 --seed 0 --out FILE`: kill -9 a process of a run, again and again.

One run of two ranks and a loader worker each is the reference. Then starts follow each other in one folder: each goes
on from what the one before left and is killed at a random moment, until the run has reached its last step; then the
next run begins. Of every start: all processes end within the time-out, and there is one message. Of every run that
ended: its curve is the reference's, number for number.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from tiny_runs import REPOSITORY, command, curve, environment, write_data, write_plan

from training import checkpoint
from training.metrics import read_lines

MARK = "SAIL_KILL_RUN"  # in the environment of every process of a start
VICTIMS = ("rank 0", "rank 1", "loader worker", "torchrun")
LIMIT = 300.0  # seconds that a start may take on a busy machine
ENDING = (
    90.0  # seconds that the others may take to end: torchrun waits 30, a loader worker looks for its parent every 5
)
# ours, and torchrun's, which alone speaks where a process dies before it has joined the others
MESSAGES = ("another process of this run", "a worker process died", "stopped by SIGHUP", "failed (exitcode: -9)")
MESSAGES += ("torchrun ended before all processes had joined",)


class Moment(NamedTuple):
    """Kill `victim` `delay` seconds after the run has made `steps` more steps, or has begun to write a checkpoint."""

    victim: str
    when: str  # start, step, save
    steps: int
    delay: float


def moments(count: int, seed: int, whens: tuple[str, ...] = ("start", "step", "step", "save")) -> list[Moment]:
    """Random ones, the same for the same seed."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        when = chance.choice(whens)
        delay = chance.uniform(0, {"start": 8.0, "step": 0.3, "save": 0.08}[when])
        found.append(Moment(chance.choice(VICTIMS), when, chance.randint(1, 5), round(delay, 3)))
    return found


class Start:
    """One start of the run in `out`: from its checkpoint, or anew."""

    def __init__(self, plan: Path, out: Path) -> None:
        self.out, self.writing = out, out / checkpoint.FOLDER
        self.found = checkpoint.latest(self.writing)
        self.begins = 0 if self.found is None else checkpoint.read_state(self.found)["total"]
        chosen = ["--config", plan, "--out", out] if self.found is None else ["--resume", out]
        self.lines, self.mark = self._lines(), uuid.uuid4().hex
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command(2, *chosen),
            env=environment(**{MARK: self.mark}),
            cwd=REPOSITORY,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def _lines(self) -> int:
        path = self.out / "metrics.jsonl"
        return len(read_lines(path)) if path.exists() else 0

    def reached(self, moment: Moment) -> bool:
        """Whether what the moment's delay counts from has happened."""
        if moment.when == "start":
            return True
        if moment.when == "save":
            return any(self.writing.glob(".writing-step-*"))
        # a start from a checkpoint first drops the lines behind it
        return self.begins + moment.steps <= self._lines() != self.lines

    def alive(self, victim: str = "") -> list[psutil.Process]:
        """The processes of this start, or those that `victim` means."""
        found = [process for process in psutil.process_iter() if self._value(process, MARK) == self.mark]
        if victim == "torchrun":
            return [process for process in found if process.pid == self.process.pid]
        if victim == "loader worker":
            return [process for process in found if _is_worker(process)]
        if victim:
            rank = victim.removeprefix("rank ")
            return [p for p in found if self._value(p, "RANK") == rank and "training" in _line(p)]
        return found

    @staticmethod
    def _value(process: psutil.Process, name: str) -> str | None:
        try:
            return process.environ().get(name) if process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None

    def printed(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def end(self) -> float:
        """Seconds until no process is left. Raises TimeoutError with what was printed."""
        began = time.monotonic()
        wait_until(lambda: self.process.poll() is not None and not self.alive(), ENDING, self)
        return time.monotonic() - began

    def close(self) -> None:
        """Leave nothing behind, whatever happened."""
        for process in self.alive():
            process.kill()
        self.process.wait()
        self._log.close()


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _is_worker(process: psutil.Process) -> bool:
    """A fork of the fork server, which has the same command line."""
    try:
        parent = process.parent()
    except psutil.Error:
        return False
    return parent is not None and "multiprocessing.forkserver" in " ".join(_line(parent))


def wait_until(reached: Callable[[], object], limit: float, start: Start) -> None:
    """Raises TimeoutError with what was printed."""
    deadline = time.monotonic() + limit
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{limit} s: {[p.cmdline() for p in start.alive()]}\n{start.printed()}")
        time.sleep(0.01)


def kill(start: Start, moment: Moment, chance: random.Random) -> dict[str, Any]:
    """Wait for the moment, kill; what then happened. "completed" where the run ended before its moment came."""

    def come() -> bool:
        return start.process.poll() is not None or start.reached(moment)

    victims: list[psutil.Process] = []

    def there() -> bool:
        victims[:] = start.alive(moment.victim)
        return bool(victims) or start.process.poll() is not None

    if moment.when == "start":
        time.sleep(moment.delay)
        wait_until(there, LIMIT, start)
    else:  # looking for processes takes longer than to write a checkpoint
        wait_until(there, LIMIT, start)
        wait_until(come, LIMIT, start)
        time.sleep(moment.delay)
    if not any(process.is_running() for process in victims):
        wait_until(there, LIMIT, start)
    writing = sorted(path.name for path in start.writing.glob(".writing-*"))
    if victims:
        chance.choice(victims).kill()
    seconds = start.end()
    printed = start.printed()
    said = [line for line in printed.splitlines() if any(words in line for words in MESSAGES)]
    return {
        **moment._asdict(),
        "killed": bool(victims),
        "while_writing": writing,
        "steps_logged": start._lines(),
        "seconds_to_end": round(seconds, 1),
        "exit": start.process.returncode,
        "messages": [line[:300] for line in said],
        "tracebacks": printed.count("Traceback (most recent call last)"),
    }


def finish(plan: Path, out: Path) -> None:
    """A start that nobody kills. Raises AssertionError with what it printed where it fails."""
    start = Start(plan, out)
    try:
        wait_until(lambda: start.process.poll() is not None, LIMIT, start)
        assert start.process.returncode == 0, start.printed()
    finally:
        start.close()


def check_curve(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Raises AssertionError at the first step that differs."""
    assert len(found) == len(wanted), f"{len(found)} steps, want {len(wanted)}"
    for one, other in zip(found, wanted, strict=True):
        assert one == other, f"{one}\nwant {other}"


def run(folder: Path, chosen: list[Moment], seed: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """All moments, one start each, and the starts that bring the last run to its end."""
    data = write_data(folder / "data")
    plan = write_plan(folder / "plan.yaml", data)
    finish(plan, folder / "reference")
    wanted, chance = curve(folder / "reference"), random.Random(seed)
    kills: list[dict[str, Any]] = []
    runs = 0
    for moment in chosen:
        start = Start(plan, folder / f"run-{runs}")
        try:
            kills.append({"run": runs, **kill(start, moment, chance)})
        finally:
            start.close()
        say(json.dumps(kills[-1]))
        if kills[-1]["exit"] == 0:  # it had reached its last step
            check_curve(curve(start.out), wanted)
            runs += 1
    if kills[-1]["exit"] != 0:
        finish(plan, folder / f"run-{runs}")
        check_curve(curve(folder / f"run-{runs}"), wanted)
        runs += 1
    return {"moments": kills, "runs_equal_to_the_reference": runs, "steps": len(wanted)}


def main() -> None:
    """Write what happened to --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), moments(given.moments, given.seed), given.seed, lambda text: print(text, flush=True))
    killed = sum(entry["killed"] for entry in found["moments"])
    versions = checkpoint.versions()
    described = {"seed": given.seed, "killed": killed, **found, "versions": versions, "cores": os.cpu_count()}
    given.out.write_text(json.dumps(described, indent=1) + "\n")
    print(f"{killed} of {given.moments} moments killed a process; {found['runs_equal_to_the_reference']} runs equal")


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
