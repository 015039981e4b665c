"""Tables, verdict and chart from the results that a benchmark run leaves in results/<device>/<family>.json.

python -m benchmarks.report            writes the block between README.md's bench:moe markers, and the chart
python -m benchmarks.report --check    exits with 1 where README.md does not match the results
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEVICE = "cpu-zen4-2core"  # whose results README shows
START, END = "<!-- bench:moe:start -->", "<!-- bench:moe:end -->"
Row = dict[str, Any]
GRADIENTS = {"fresh": "fresh", "huge_pages": "fresh, 2 MiB pages", "in_place": "added in place"}
PEERS = {"grouped_mm": "grouped_mm", "eager_unbind": "eager + unbind", "stock_eager": "stock eager"}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, padded to be read in a terminal too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def timings(benchmarks: list[Row], dtype: str | None = None) -> list[Row]:
    """extra_info of the timed rows of bench_moe.py, in the order they ran."""
    infos = [b["extra_info"] for b in benchmarks if b["extra_info"].get("family") == "moe"]
    return [i for i in infos if i["kind"] != "memory" and dtype in (None, i["case"]["dtype"])]


def speed_table(infos: list[Row]) -> str:
    """A line a case: our time and rates, each peer's time over ours, fractions of the limits."""
    header = ["routing", "T", "step", "ms", "GFLOP/s", "weights GB/s"]
    header += [f"x {label}" for label in PEERS.values()] + ["of dense mm", "of read", "of limit"]
    rows = []
    for i in infos:
        case = i["case"]
        step = "forward" if case["mode"] == "forward" else f"fwd+bwd, dW {GRADIENTS[case['gradients']]}"
        rows.append(
            [f"{case['dtype']} {case['routing']}", str(case["T"]), step]
            + [f"{i['ms']['sail']:.1f}", f"{i['gflops']:.0f}", f"{i['weights_gb_s']:.1f}"]
            + [f"{i['speedup'][peer]:.2f}" if peer in i["speedup"] else "" for peer in PEERS]
            + [f"{i['of_dense_mm']:.2f}", f"{i['of_read_bandwidth']:.2f}", f"{i['of_limit']:.2f}"]
        )
    return table(header, rows)


def memory_table(benchmarks: list[Row]) -> str:
    """Bytes a token of one training step with dW in place, beside what the design allows."""
    header = ["dtype", "implementation", "saved for backward", "allowed", "transient peak", "allowed"]
    rows = []
    for info in (b["extra_info"] for b in benchmarks if b["extra_info"].get("kind") == "memory"):
        for name, m in info["memory"].items():
            ours = name.startswith("sail")
            allowed = [f"{m[key] / m['tokens']:,.0f}" if ours else "" for key in ("saved_formula", "transient_formula")]
            saved, transient = (f"{m[key] / m['tokens']:,.0f}" for key in ("saved", "transient"))
            rows.append([info["case"].split("-")[0], name, saved, allowed[0], transient, allowed[1]])
    return table(header, rows) if rows else ""


def verdict(benchmarks: list[Row]) -> str:
    """Does "3x faster training" hold? By baseline and by where dW goes, over both routings and sizes, in bf16."""
    lines = []
    for peer, label in PEERS.items():
        for gradients, where in GRADIENTS.items():
            infos = [i for i in timings(benchmarks, "bf16") if i["case"]["gradients"] == gradients]
            ratios = [i["speedup"][peer] for i in infos if peer in i["speedup"]]
            if ratios:
                low, high = min(ratios), max(ratios)
                holds = "yes" if low >= 3 else "no" if high < 3 else "in part"
                note = " (an artefact: each W[e] builds a full-size zero gradient)" if peer == "stock_eager" else ""
                span = f"{low:.2f}x" if low == high else f"{low:.2f}x to {high:.2f}x"
                lines.append([f"{label}{note}", where, span, holds])
    return table(["bf16 training against", "dW", "speed-up", "3x?"], lines) if lines else ""


def summary(benchmarks: list[Row]) -> str:
    """What a benchmark run prints at its end."""
    parts = [speed_table(timings(benchmarks)), memory_table(benchmarks), verdict(benchmarks)]
    return "\n\n".join(part for part in parts if part)
