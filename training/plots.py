"""The curves of a run as one PNG."""

from pathlib import Path

from training.metrics import read_lines

SMOOTHING = 0.95


def plot_curves(metrics: Path, png: Path) -> None:
    """Loss (raw and smoothed), balance loss and expert-activation entropy of each layer, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_lines(metrics)
    steps = [line["step"] for line in lines]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    left.plot(steps, [line["loss"] for line in lines], alpha=0.3, linewidth=0.8)
    left.plot(steps, smoothed([line["loss"] for line in lines]), color="C0")
    left.set(title="answer loss (nats a token)", xlabel="step", yscale="log")
    for axes, name in ((middle, "balance_loss"), (right, "expert_entropy")):
        for layer in range(len(lines[0][name])):
            axes.plot(steps, smoothed([line[name][layer] for line in lines]), label=f"layer {layer}")
        axes.set(title=name.replace("_", " "), xlabel="step")
        axes.legend(fontsize="small")
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=110)
    pyplot.close(figure)


def smoothed(values: list[float]) -> list[float]:
    """Exponential mean with the start-up bias divided out."""
    mean, out = 0.0, []
    for n, value in enumerate(values, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        out.append(mean / (1 - SMOOTHING**n))
    return out
