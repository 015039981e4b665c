"""Everything that needs a card, in one command: python tests/gpu/check.py [--only PATTERN] [--budget SECONDS]

First contact (every kernel family on this card: right, the same every time, and which kernel ran), then the headlines
(speed against named peers), the suites, compute-sanitizer, Triton's kernels and the benchmarks in full. Made for a card
that is there for minutes: --budget stops in time and names what found none, a card that no longer answers ends the run,
and DIR (--out) has at any moment what was found until then (check_report.py).

The machine needs a CUDA build of torch >= 2.11, pytest and hypothesis; for peers transformers and liger-kernel. Where
it has nvcc it builds the libraries, else copy built ones with the checkout: sail_ops/libsail_ops_{cpu,cuda}.so, 23 MB,
for every Python. `make gpu-bundle` on a machine with nvcc makes both ready in build/gpu-bundle, below 60 MB: the
checkout with its libraries, and beside it the wheels that such a machine rarely has. There, with no network:

    SAIL_WHEELS=../wheels make -C sail-ops gpu-check PYTHON=python3 ARGS="--budget 570 --out DIR"

--list names the stages; --emulated rehearses them on the emulator of CUDA kernels, without a card.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import FrameType

import contact
from check_report import TAIL, Report
from stages import ROOT, Stage, python, stages

LIBRARY = ROOT / "sail_ops" / "libsail_ops_cuda.so"
CPU_LIBRARY = ROOT / "sail_ops" / "libsail_ops_cpu.so"
LEAST = 3.0  # seconds that are worth starting a stage for
TEST_SECONDS = 120  # of one test: a kernel that hangs holds the process


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    deadline = time.monotonic() + options.budget
    compiled = options.emulated or LIBRARY.exists() or bool(shutil.which("nvcc"))
    todo = stages(options.emulated, compiled)
    todo = {name: todo[name] for name in contact.chosen(list(todo), options.only)}
    if options.list:
        print("\n".join(f"{stage.limit:5.0f} s  {name}" for name, stage in todo.items()))
        return 0
    signal.signal(signal.SIGTERM, terminated)
    report = Report(options.out)
    environment = prepare(options.emulated, compiled)
    run_of = {"commit": commit(), "arguments": sys.argv[1:] if arguments is None else arguments}
    report.record(run=run_of | {"date": datetime.now(timezone.utc).isoformat(), "python": sys.version.split()[0]})
    if (
        contact.alone(
            partial(contact.probe, options.emulated, report.results), contact.seconds(options.emulated), report.log
        )
        != "ok"
    ):
        report.say(report.output(0, TAIL))
        sys.exit("gpu-check: no card that torch can use answers")
    report.say(report.results.read_text().splitlines()[-1])
    return run_all(todo, report, environment, deadline, partial(contact.probe, options.emulated), note(compiled))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="the stages and their limits")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="stages that this expression finds")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="of the whole run")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", metavar="DIR")
    parser.add_argument("--emulated", action="store_true", help="on the emulator of CUDA kernels")
    return parser.parse_args(arguments)


def terminated(number: int, frame: FrameType | None) -> None:
    """`timeout` and batch systems ask first: the stage under way is recorded, and the verdict written."""
    sys.exit(f"gpu-check: ended by {signal.Signals(number).name}")


def note(compiled: bool) -> str:
    return "" if compiled else f"Triton alone: {LIBRARY.name} is missing and there is no nvcc to build it"


def prepare(emulated: bool, compiled: bool) -> dict[str, str]:
    """The environment of every stage; builds what is missing, so that no stage's time goes there."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if wheels := os.environ.get("SAIL_WHEELS"):
        environment["PYTHONPATH"] += f":{unpacked(Path(wheels))}"
    if emulated:
        return environment | prepare_emulator()
    if not compiled and not importlib.util.find_spec("triton"):
        sys.exit(f"gpu-check: {LIBRARY} is missing, there is no nvcc to build it, and Triton is not installed")
    if not CPU_LIBRARY.exists() or (compiled and not LIBRARY.exists()):
        setup = [sys.executable, "setup.py", "build_ext", "--inplace"]
        with_cuda = {"SAIL_OPS_CUDA": "ON" if compiled and not LIBRARY.exists() else "OFF"}
        subprocess.run(setup, check=True, cwd=ROOT, env=environment | with_cuda)
    # a checkout that was only unpacked has no metadata (a bundle has), and the report and the results name the version
    if not [*ROOT.glob("sail_ops*.egg-info"), *ROOT.glob("sail_ops*.dist-info")]:
        subprocess.run([sys.executable, "setup.py", "-q", "egg_info"], cwd=ROOT, env=environment, check=True)
    return environment


def unpacked(wheels: Path) -> Path:
    """The wheels' packages in a folder for PYTHONPATH, before those of this Python."""
    found, site = sorted(wheels.glob("*.whl")), ROOT / "build" / "site"
    if not found:
        sys.exit(f"gpu-check: SAIL_WHEELS: got {str(wheels)!r}, which has no wheels, want a folder of them")
    install = ["-q", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(site)]
    subprocess.run([*python("pip"), "install", *install, *map(str, found)], check=True)
    return site


def prepare_emulator() -> dict[str, str]:
    from emulated_library import build

    build()
    sizes = {"SAIL_EMULATED_CARD": contact.EMULATED_CARD, "SAIL_BENCH_SIZE": "tiny", "OMP_NUM_THREADS": "1"}
    return sizes | {"SAIL_TEST_DEVICE": "emulated"}


def commit() -> str:
    """Of a bundle, or of the checkout."""
    if (bundled := ROOT / "COMMIT").exists():
        return bundled.read_text().strip()
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return found or "unknown"


def run_all(
    todo: dict[str, Stage],
    report: Report,
    environment: dict[str, str],
    deadline: float,
    probe: Callable[[], None],
    note: str = "",
) -> int:
    """How many stages failed. The card is asked after each; where it is silent, the others are not run."""
    silent_after, started = "", time.time()
    left = iter(todo.items())
    try:
        for name, stage in left:
            if deadline - time.monotonic() < LEAST:
                report.ended(name, "no time left")
                continue
            run(name, stage, report, environment, deadline)
            report.keep([p for p in (ROOT / "benchmarks/results").glob("*/*.json*") if p.stat().st_mtime >= started])
            if report.statuses[name] != "skipped" and contact.alone(probe, contact.LIMIT, report.log) != "ok":
                silent_after = name
                break
    finally:
        for name, _ in left:
            report.ended(name, "not run")
        report.verdict(silent_after, note)
    failed = sum(status in ("FAILED", "timed out") for status in report.statuses.values())
    return failed or int(bool(silent_after) or "ok" not in report.statuses.values())


def run(name: str, stage: Stage, report: Report, environment: dict[str, str], deadline: float) -> None:
    """Records a stage's status, seconds and measurements; past its limit its whole process group is killed."""
    environment = environment | stage.environment
    if reason := lacking(stage, environment):
        return report.ended(name, "skipped", reason=reason)
    start, limit = time.monotonic(), min(stage.limit, deadline - time.monotonic())
    measurements = (report.folder / f"{name}.jsonl").resolve()
    command = command_of(stage, environment, limit, measurements)
    begin, status = report.begin(f"==== {name}: {' '.join(command)}"), "interrupted"
    with report.log.open("ab") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        status = "ok" if process.wait(limit) == 0 else "FAILED"
    except subprocess.TimeoutExpired:
        status = "timed out"
    finally:  # SIGTERM and Ctrl-C too: a process group of its own does not hear them
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # the driver may hold a process for good
                process.wait(10)
        report.ended(name, status, time.monotonic() - start, limit)
        report.measured(name, measurements, partial=status != "ok")
        report.say(report.output(begin, stage.shown if status == "ok" else max(TAIL, stage.shown)))
        report.trim(begin)


def command_of(stage: Stage, environment: dict[str, str], limit: float, measurements: Path) -> list[str]:
    """With the limits that the stage keeps by itself: a test's, and a tenth less than its own where it measures."""
    if stage.measures:
        return [*stage.command, "--out", str(measurements), "--budget", f"{0.9 * limit:.1f}"]
    if stage.command[1:3] == ["-m", "pytest"] and runs("import pytest_timeout", environment):
        return [*stage.command, f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]
    return stage.command


def lacking(stage: Stage, environment: dict[str, str]) -> str:
    """What this machine has not, of what the stage cannot do without."""
    if not shutil.which(stage.command[0]):
        return f"{stage.command[0]} is not here"
    return "" if not stage.needs or runs(stage.needs, environment) else f"no: {stage.needs.split(';')[0]}"


def runs(code: str, environment: dict[str, str]) -> bool:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True).returncode == 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # multiprocessing would wait for a probe that the driver holds
