"""The few figures that decide, on a card that is there for minutes: python -m benchmarks.headlines --out FILE.jsonl

The expert layer at T 8192 and 32768, attention at S 4096 and a whole decoder layer, each beside its peers, ours first.
A measurement is one line of JSON, written as soon as it is there; at the end comes the verdict on "3x" by baseline.
A peer takes turns with ours, A B A B, so that both meet the same clock; one a hundred times as slow is timed once.
--budget stops in time and names what found none. --tiny runs every line where there is no card, and means nothing.
"""

import argparse
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ROUND_SECONDS, MOST_ROUNDS, LEAST_ROUNDS = 0.5, 20, 5  # of a peer's turns with ours
LEAST = 2.0  # seconds that a measurement is started for
ONCE = ("stock_eager",)  # 0.3 s a step on a card, and an artefact: each W[e] builds a zero gradient of W's full size


class Headline(NamedTuple):
    """A case, how its steps are made, and with whom it is compared."""

    case: str
    steps: Callable[[], Any]
    peers: list[str]


def headlines(tiny: bool) -> Iterator[Headline]:
    """In the order of what matters most."""
    from benchmarks import bench_attention, bench_attention_cuda, bench_moe_cuda, bench_step_cuda, events
    from benchmarks.bench_step import LayerSteps
    from benchmarks.cases import MoeCase, size_name

    device, size = events.DEVICE, size_name()
    for T in (64,) if tiny else (8192, 32768):
        for mode in ("train", "forward"):
            case = MoeCase("bf16", "uniform", T, mode, "fresh" if mode == "train" else None, size, device)
            peers = ["sail_cluster", "grouped_mm", "liger"]
            if mode == "train" and T != 32768:
                peers += ["eager_unbind", "stock_eager"]
            yield Headline(f"experts T{T} {mode}", lambda case=case: bench_moe_cuda.CardLayer(case), peers)
    for name in ("S4096-train", "S4096-forward"):
        shape = bench_attention.sized(bench_attention_cuda.CASES[name])
        yield Headline(
            f"attention {name}",
            lambda shape=shape: bench_attention_cuda.CardSteps(shape, device),
            ["sdpa_flash", "sdpa_cudnn"],
        )
    tokens = bench_step_cuda.TOKENS[0]
    lengths = bench_step_cuda.pack(tokens)
    step = Headline(
        f"decoder layer T{tokens}", lambda: LayerSteps("bf16", size, device, lengths), ["transformers", "liger"]
    )
    yield step


class Run:
    """Where lines go, and until when."""

    def __init__(self, out: Path | None, budget: float) -> None:
        self.file = None if out is None else out.open("a", encoding="utf-8")
        self.deadline = time.monotonic() + budget
        self.lines: list[dict[str, Any]] = []
        self.failed = False

    def write(self, **line: Any) -> None:
        """One line, on disk at once."""
        self.lines.append(line)
        if self.file is not None:
            self.file.write(json.dumps({"name": "headline", **line}) + "\n")
            self.file.flush()
        shown = {key: value for key, value in line.items() if key in ("ms", "speedup", "not_measured", "failed")}
        print(f"{line['case']:24} {line['implementation']:14} {json.dumps(shown)}", flush=True)

    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline - LEAST


def measure(run: Run, headline: Headline) -> None:
    """Ours alone, then each peer in turns with ours. A failure of ours ends the case, one of a peer is a line."""
    from benchmarks import events

    names = ["sail", *headline.peers]
    if run.out_of_time():
        for name in names:
            run.write(case=headline.case, implementation=name, not_measured="no time left")
        return
    clock, steps = events.Events(), headline.steps()
    try:
        ours = rounds(clock, steps, ["sail"])["sail"]
    except Exception as error:
        run.failed = True
        traceback.print_exc()
        run.write(case=headline.case, implementation="sail", failed=f"{type(error).__name__}: {error}"[:300])
        return
    facts = events.state() | {"kernels": events.kernel_names(steps, "sail")}
    run.write(case=headline.case, implementation="sail", ms={"sail": 1e3 * median(ours)}, samples=ours, **facts)
    for name in headline.peers:
        if run.out_of_time():
            run.write(case=headline.case, implementation=name, not_measured="no time left")
        elif why := events.failure(steps, name):
            run.write(case=headline.case, implementation=name, not_measured=why)
        else:
            compare(run, headline.case, clock, steps, name)


def compare(run: Run, case: str, clock: Any, steps: Any, name: str) -> None:
    """The peer's line: both medians of their turns, and its time over ours."""
    from benchmarks import events

    samples = rounds(clock, steps, ["sail", name])
    ms = {who: 1e3 * median(times) for who, times in samples.items()}
    facts = events.state() | {"kernels": events.kernel_names(steps, name)}
    speedup = {name: ms[name] / ms["sail"]}
    run.write(case=case, implementation=name, ms=ms, speedup=speedup, samples=samples, **facts)


def rounds(clock: Any, steps: Any, names: list[str]) -> dict[str, list[float]]:
    """Seconds of every turn; one turn where a name of ONCE is among them, or times mean nothing."""
    from benchmarks.cases import size_name

    once = sum(clock.step(steps, name) for name in names)  # compiles, tunes, allocates
    if any(name in ONCE for name in names) or size_name() == "tiny":
        count = 1
    else:
        once = sum(clock.step(steps, name) for name in names)
        count = min(MOST_ROUNDS, max(LEAST_ROUNDS, int(ROUND_SECONDS / once)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(count):
        for name in names:
            samples[name].append(clock.step(steps, name))
    return samples


def verdict(lines: list[dict[str, Any]]) -> str:
    """Whether the expert layer trains three times as fast, by baseline."""
    from benchmarks.report import claim
    from benchmarks.tables import PEERS, table

    found: dict[str, list[float]] = {}
    for line in lines:
        if line["case"].startswith("experts") and line["case"].endswith("train"):
            for name, ratio in line.get("speedup", {}).items():
                found.setdefault(name, []).append(ratio)
    rows = [[PEERS.get(name, name), *claim(ratios)] for name, ratios in found.items()]
    if not rows:
        return "3x: nothing was measured"
    return table(["expert layer, bf16 training, against", "ours is faster by", "3x?"], rows)


def without_card() -> AbstractContextManager[None]:
    """Sizes, clock and device for a machine without one; the CUDA sources where SAIL_TEST_DEVICE=emulated."""
    from benchmarks import events

    events.DEVICE, events.Events = "cpu", events.WallClock  # type: ignore[misc]
    if os.environ.get("SAIL_TEST_DEVICE") != "emulated":
        return nullcontext()
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from emulated_library import emulated

    return emulated()


def main(arguments: list[str] | None = None) -> int:
    """1 where ours failed somewhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="lines of JSON are added to it")
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases that this expression finds")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--tiny", action="store_true", help="without a card")
    options = parser.parse_args(arguments)
    if options.tiny:
        os.environ["SAIL_BENCH_SIZE"] = "tiny"
    run = Run(options.out, options.budget)
    with without_card() if options.tiny else nullcontext():
        for headline in headlines(options.tiny):
            if re.search(options.only, headline.case):
                measure(run, headline)
    print(verdict(run.lines), flush=True)
    return int(run.failed)


if __name__ == "__main__":
    sys.exit(main())
