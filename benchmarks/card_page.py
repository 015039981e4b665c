"""RESULTS.md's part on a card beside the tables of whole runs: runs that ended early, headlines, kernels by prediction.

Of benchmarks/results/<device>/: <family>.partial.jsonl, which journal.py wrote, and headlines.jsonl, a copy of what
`make gpu-check` left in results.jsonl, or of what benchmarks.headlines wrote.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks import headlines, journal
from benchmarks.predictions import of_card, prediction_table, predictions
from benchmarks.tables import Row, table


def parts(folder: Path, whole: dict[str, Row]) -> list[str]:
    """Of the card whose folder it is; `whole`: its results by family."""
    unfinished = {family: results for family, results in partial_runs(folder).items() if family not in whole}
    found = []
    for family, results in unfinished.items():
        found += [f"### A run of {family} that ended early", partial_table(results)]
    lines = headline_lines(folder)
    measured = [line for line in lines if line.get("name") == "headline"]
    if measured:
        found += ["### Headlines", f"{headlines.verdict(measured)}\n\n{provenance(lines)}"]
    runs = [*whole.values(), *unfinished.values()]
    rows = [row["extra_info"] for results in runs for row in results["benchmarks"]]
    rows += [line["row"] for line in measured if "row" in line]
    kernels = prediction_table(of_card(folder.name), rows) or f"No prediction is kept for {folder.name}."
    return [*found, "### Kernels, measured and predicted", kernels]


def partial_runs(folder: Path) -> dict[str, Row]:
    """What runs that ended early have left, by family."""
    paths = sorted(folder.glob(f"*{journal.SUFFIX}"))
    return {path.name.removesuffix(journal.SUFFIX): journal.read(path) for path in paths}


def partial_table(results: Row) -> str:
    """A line a row: ours, and the peers that it was measured with."""
    lines = []
    for row in results["benchmarks"]:
        info = row["extra_info"]
        peers = ", ".join(f"{ratio:.2f} {name}" for name, ratio in info["speedup"].items())
        lines.append([row["name"], row["state"], f"{info['ms']['sail']:.3f}", peers])
    return table(["row", "state", "ms", "x peers"], lines)


def headline_lines(folder: Path) -> list[dict[str, Any]]:
    """Of the file, if there is one."""
    path = folder / "headlines.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def provenance(lines: list[dict[str, Any]]) -> str:
    """The commit and day that the check wrote first, and whether it was cut short."""
    run = next((line["run"] for line in lines if "run" in line), None)
    text = f"Commit {run['commit'][:10]}, {run['date'][:10]}" if run else "Of no commit that the file names"
    return text + (", cut short." if any(line.get("partial") for line in lines) else ".")


def without_results(devices: list[str]) -> list[str]:
    """Of cards that have predictions, and no folder among `devices`."""
    measured = {prediction.device for device in devices for prediction in of_card(device)}
    found = []
    for name in dict.fromkeys(prediction.device for prediction in predictions()):
        if name not in measured:
            found += [f"## {name}: no card has run it", prediction_table(of_card(name), [])]
    return found
