"""The curves of a run as one PNG."""

import math
from pathlib import Path
from typing import Any

from training.metrics import read_lines

SMOOTHING = 0.95


def plot_curves(metrics: Path, png: Path) -> None:
    """Loss (raw and smoothed), balance loss and expert-activation entropy of each layer, over steps and stages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_lines(metrics)
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    steps, losses = curve(lines, "loss")
    left.plot(steps, losses, alpha=0.3, linewidth=0.8)
    left.plot(steps, smoothed(losses), color="C0")
    left.set(title="answer loss (nats a token)", xlabel="step", yscale="log")
    for axes, name in ((middle, "balance_loss"), (right, "expert_entropy")):
        for layer in range(max((len(line[name]) for line in lines), default=0)):
            steps, values = curve(lines, name, layer)
            axes.plot(steps, smoothed(values), label=f"layer {layer}")
        axes.set(title=name.replace("_", " "), xlabel="step")
        if axes.lines:
            axes.legend(fontsize="small")
    for axes in (left, middle, right):
        for step, stage in stage_starts(lines):
            axes.axvline(step, color="gray", linewidth=0.6, linestyle=":")
            axes.annotate(stage, (step, 0.02), xycoords=("data", "axes fraction"), fontsize="x-small", rotation=90)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=110)
    pyplot.close(figure)


def curve(lines: list[dict[str, Any]], name: str, layer: int | None = None) -> tuple[list[int], list[float]]:
    """(steps, values) of a figure, or of its expert layer where a stage has that layer; without what is not finite,
    as of a skipped step, which no mean would recover from."""
    found = [(line["step"], line[name] if layer is None else dict(enumerate(line[name])).get(layer)) for line in lines]
    kept = [(step, value) for step, value in found if value is not None and math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]


def stage_starts(lines: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """(first step, name) of each stage; none where there is one alone."""
    changes = [
        (line["step"], line["stage"])
        for before, line in zip([None, *lines], lines, strict=False)
        if before is None or before["stage"] != line["stage"]
    ]
    return changes if len(changes) > 1 else []


def smoothed(values: list[float]) -> list[float]:
    """Exponential mean with the start-up bias divided out."""
    mean, out = 0.0, []
    for n, value in enumerate(values, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        out.append(mean / (1 - SMOOTHING**n))
    return out
