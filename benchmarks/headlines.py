"""The few figures that decide, on a card that is there for minutes: python -m benchmarks.headlines --out FILE.jsonl

The expert layer at T 8192 and 32768, attention at S 4096, a whole decoder layer and the bare grouped product, each
beside its peers, ours first. A measurement is one line of JSON, written as soon as it is there; at the end come our
kernels' times beside what was predicted of them (predictions.py), and the verdict on "3x" by baseline.
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
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ROUND_SECONDS, MOST_ROUNDS, LEAST_ROUNDS = 0.5, 20, 5  # of a peer's turns with ours
SHOWN = ("ms", "speedup", "not_measured", "failed", "kernels_failed")  # of a line, on the terminal
LEAST = 2.0  # seconds that a measurement is started for


class Headline(NamedTuple):
    """A case, how its steps are made, with whom it is compared, and the row of the benchmarks that it is."""

    case: str
    steps: Callable[[], Any]
    peers: list[str]
    row: dict[str, Any]


def headlines(tiny: bool) -> Iterator[Headline]:
    """In the order of what matters most."""
    from benchmarks import (
        bench_attention,
        bench_attention_cuda,
        bench_grouped_mm_cuda,
        bench_moe_cuda,
        bench_step_cuda,
        events,
    )
    from benchmarks.bench_step import LayerSteps
    from benchmarks.cases import MoeCase, size_name

    device, size = events.DEVICE, size_name()
    for T in (64,) if tiny else (8192, 32768):
        for mode in ("train", "forward"):
            case = MoeCase("bf16", "uniform", T, mode, "fresh" if mode == "train" else None, size, device)
            peers = ["sail_cluster", "grouped_mm", "liger"]
            if mode == "train" and T != 32768:
                peers += ["eager_unbind", "stock_eager"]
            row = {"family": "moe", "case": vars(case) | vars(case.sizes)}
            yield Headline(f"experts T{T} {mode}", lambda case=case: bench_moe_cuda.CardLayer(case), peers, row)
    for name in ("S4096-train", "S4096-forward"):
        shape = bench_attention.sized(bench_attention_cuda.CASES[name])
        yield Headline(
            f"attention {name}",
            lambda shape=shape: bench_attention_cuda.CardSteps(shape, device),
            ["sdpa_flash", "sdpa_cudnn"],
            {"family": "attention", "case": {"name": name, **shape._asdict()}},
        )
    tokens = bench_step_cuda.TOKENS[0]
    lengths = bench_step_cuda.pack(tokens)
    row = {"family": "step", "case": {"layer": "Qwen3-30B-A3B", "dtype": "bf16", "T": tokens}}
    peers = ["transformers", "liger"]
    yield Headline(f"decoder layer T{tokens}", lambda: LayerSteps("bf16", size, device, lengths), peers, row)
    for mode, layout in bench_grouped_mm_cuda.CASES:
        row = {"family": "grouped_mm", "case": {"mode": mode, "layout": layout}}
        arguments = mode, layout, 64 if tiny else bench_grouped_mm_cuda.TOKENS, size, device
        steps = partial(bench_grouped_mm_cuda.GroupedMmSteps, *arguments)
        yield Headline(f"grouped_mm {mode} {layout}", steps, ["torch"], row)


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
        shown = {key: line[key] for key in SHOWN if key in line}
        print(f"{line['case']:24} {line['implementation']:14} {json.dumps(shown)}", flush=True)

    def measured(self, headline: Headline, name: str, steps: Any, samples: dict[str, list[float]]) -> None:
        """An implementation's line: medians of all turns, its time over ours, clock and power, and what ran."""
        from benchmarks import events, kernels

        facts = events.state() | kernels.facts(steps, [name])
        if launches := facts.pop("launches"):
            facts["row"] = headline.row | {"launches": launches}
        ms = {who: 1e3 * median(times) for who, times in samples.items()}
        facts |= {} if name == "sail" else {"speedup": {name: ms[name] / ms["sail"]}}
        self.write(case=headline.case, implementation=name, ms=ms, samples=samples, **facts)

    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline - LEAST


def measure(run: Run, headline: Headline) -> None:
    """Ours alone, then each peer in turns with ours. A failure of ours ends the case, one of a peer is a line."""
    from benchmarks import events, rows

    names = ["sail", *headline.peers]
    if run.out_of_time():
        for name in names:
            run.write(case=headline.case, implementation=name, not_measured="no time left")
        return
    clock, steps = events.Events(), headline.steps()
    try:
        samples = rounds(clock, steps, ["sail"])
    except Exception as error:
        run.failed = True
        traceback.print_exc()
        run.write(case=headline.case, implementation="sail", failed=f"{type(error).__name__}: {error}"[:300])
        return
    run.measured(headline, "sail", steps, samples)
    for name in headline.peers:
        if run.out_of_time():
            run.write(case=headline.case, implementation=name, not_measured="no time left")
        elif why := rows.failure(steps, name):
            run.write(case=headline.case, implementation=name, not_measured=why)
        else:
            run.measured(headline, name, steps, rounds(clock, steps, ["sail", name]))


def rounds(clock: Any, steps: Any, names: list[str]) -> dict[str, list[float]]:
    """Seconds of every turn; one turn where a peer that is timed once is among them, or times mean nothing."""
    from benchmarks import rows
    from benchmarks.cases import size_name

    if any(name in rows.ONCE for name in names) or size_name() == "tiny":
        return rows.rounds(clock, steps, names, 0.0, least=1, most=1)
    return rows.rounds(clock, steps, names, ROUND_SECONDS, LEAST_ROUNDS, MOST_ROUNDS)


def kernel_times(lines: list[dict[str, Any]], card: str) -> str:
    """Our kernels beside their predictions for that card, those that were measured; "" without any."""
    from benchmarks.predictions import of_card, prediction_table

    return prediction_table(of_card(card), [line["row"] for line in lines if "row" in line], missing=False)


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


def torch_card() -> str:
    """The card's name."""
    import torch

    return str(torch.cuda.get_device_name(0))


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
    card = "" if options.tiny else torch_card()
    for text in filter(None, (kernel_times(run.lines, card), verdict(run.lines))):
        print(text, flush=True)
    return int(run.failed)


if __name__ == "__main__":
    sys.exit(main())
