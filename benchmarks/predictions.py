"""What was reckoned for a card's kernels before any had run (predictions.json), beside what was measured there.

A line of the file is a time of some kernels of a step, with its floor (all flop at the tensor cores' rate, or all bytes
at the rate of HBM, whichever takes longer; of several kernels the sum of theirs), and names the entry of docs/decisions
that says how it was reckoned. A kernel is named by its function, by its epilogue where that tells products apart, and
by which of its launches in the step is meant: all of them where none is named.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.kernels import Launch
from benchmarks.tables import Row, table

FILE = Path(__file__).with_name("predictions.json")
HEADER = ["kernels", "measured, ms", "predicted", "floor", "of", "measured / predicted", "reckoned in"]


class Prediction(NamedTuple):
    """`ms` is one number or a span; `span`: from the first kernel's start to the last one's end, not their sum."""

    device: str
    family: str
    case: dict[str, Any]
    step: str
    kernels: list[dict[str, Any]]
    ms: float | list[float]
    floor_ms: float
    floor: str
    source: str
    implementation: str = "sail"
    span: bool = False

    @property
    def title(self) -> str:
        """In a table: family, case, kernels."""
        case = self.case.get("name") or " ".join(
            [str(self.case[key]) for key in ("op", "mode") if key in self.case]
            + [f"{key} {self.case[key]}" for key in ("T", "D", "V") if key in self.case]
        )
        clusters = " by clusters" if self.implementation == "sail_cluster" else ""
        return f"{self.family} {case}: {self.step}{clusters}"

    @property
    def bounds(self) -> tuple[float, float]:
        low, high = self.ms if isinstance(self.ms, list) else (self.ms, self.ms)
        return low, high


@cache
def predictions() -> tuple[Prediction, ...]:
    """Every line of the file, in its order."""
    return tuple(Prediction(**line) for line in json.loads(FILE.read_text()))


def of_card(name: str) -> list[Prediction]:
    """Those for a card of that name, or of that folder of benchmarks/results."""
    words = re.split(r"\W+", name.lower())
    return [prediction for prediction in predictions() if prediction.device.lower() in words]


def selected(wanted: dict[str, Any], launches: Iterable[Launch]) -> list[Launch]:
    """The launches that a line's kernel names; none where the step has not so many."""
    found = [launch for launch in launches if is_kernel(launch.symbol, wanted["name"], wanted.get("epilogue", ""))]
    return found[wanted["launch"] : wanted["launch"] + 1] if "launch" in wanted else found


def is_kernel(symbol: str, name: str, epilogue: str) -> bool:
    """Whether a symbol is that of our function, and has the epilogue among its template arguments."""
    head, _, arguments = symbol.partition("<")
    ours = re.fullmatch(r"sail::cuda::(?:(?:\w+|\(anonymous namespace\))::)*(\w+)", head)
    return ours is not None and ours[1] == name and re.search(rf"\b{epilogue}\b", arguments or " ") is not None


def measured_ms(prediction: Prediction, rows: Iterable[Row]) -> float | None:
    """Milliseconds of its kernels in the first row that has them all."""
    for row in rows:
        same = row["family"] == prediction.family and not row["case"].get("graph")
        if not same or any(row["case"].get(key) != value for key, value in prediction.case.items()):
            continue
        launches = [Launch(*launch) for launch in row.get("launches", {}).get(prediction.implementation, ())]
        found = [selected(wanted, launches) for wanted in prediction.kernels]
        if all(found):
            return milliseconds(sum(found, []), prediction.span)
    return None


def milliseconds(launches: Sequence[Launch], span: bool) -> float:
    """Of the kernels together, with what lies between them where `span`."""
    if span:
        return max(launch.end for launch in launches) - min(launch.start for launch in launches)
    return sum(launch.end - launch.start for launch in launches)


def prediction_table(wanted: Iterable[Prediction], rows: Sequence[Row], missing: bool = True) -> str:
    """A line a prediction: measured, predicted, floor. `missing`: also where nothing was measured, which is said."""
    lines = []
    for prediction in wanted:
        measured = measured_ms(prediction, rows)
        if measured is not None or missing:
            lines.append(line(prediction, measured))
    return table(HEADER, lines)


def line(prediction: Prediction, measured: float | None) -> list[str]:
    low, high = prediction.bounds
    predicted = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    shown = "not measured" if measured is None else f"{measured:.3f}"
    over = "" if measured is None else f"{2 * measured / (low + high):.2f}"
    return [prediction.title, shown, predicted, f"{prediction.floor_ms:g}", prediction.floor, over, prediction.source]
