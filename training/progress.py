"""What the user sees while training: a rich bar on a terminal, one line now and then elsewhere; a table at the end."""

import math
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from training.metrics import peak_memory, read_lines

FIGURES = "{task.fields[text]}"


class TrainingProgress:
    """Use as a context; silent on every process but the first."""

    def __init__(self, steps: int, start: int, log_every: int, *, shown: bool) -> None:
        self.console = Console(quiet=not shown, highlight=False)
        self.steps, self.log_every = steps, log_every
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(FIGURES),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (shown and self.console.is_terminal),
        )
        self._task = self._bar.add_task("", total=steps, completed=start, text="")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, line: dict[str, Any]) -> None:
        """Show a step by its line of metrics.jsonl."""
        step, text = line["step"], figures(line)
        self._bar.update(self._task, completed=step, text=text)
        if not self.console.is_terminal and (step % self.log_every == 0 or step == self.steps):
            self.say(f"step {step}/{self.steps}  {text}")

    def say(self, text: str) -> None:
        """One line above the bar."""
        self.console.print(text, soft_wrap=True)


def figures(line: dict[str, Any]) -> str:
    """A step in a few words."""
    return (
        f"{line['stage']}  loss {line['loss']:.4f}  {line['tokens_per_s']:,.0f} tokens/s  MFU {line['mfu']:.1%}"
        f"  {peak_memory() / 2**30:.1f} GiB  data {line['data_wait']:.1%}"
    )


def closing_table(metrics: Path, seconds: float) -> Table:
    """A column for each stage of a run: what it did, and how fast. `seconds` is this process's own time."""
    lines = read_lines(metrics)
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    columns = [_summary([line for line in lines if line["stage"] == stage]) for stage in stages]
    table = Table("", *stages)
    for name in columns[0] if columns else ():
        table.add_row(name, *(column[name] for column in columns))
    table.caption = f"{seconds:,.0f} s, peak memory {peak_memory() / 2**30:.1f} GiB"
    return table


def _summary(lines: list[dict[str, Any]]) -> dict[str, str]:
    took, tokens = (sum(line[name] for line in lines) for name in ("seconds", "tokens"))
    mfu, wait = (sum(line[name] * line["seconds"] for line in lines) / took for name in ("mfu", "data_wait"))
    return {
        "steps": f"{len(lines):,}",
        "tokens": f"{tokens:,}",
        "time": f"{took:,.0f} s",
        "tokens/s": f"{tokens / took:,.0f}",
        "MFU": f"{mfu:.1%}",
        "waited for data": f"{wait:.1%}",
        "padding": f"{sum(line['padding'] for line in lines) / len(lines):.1%}",
        "loss": f"{_ends(lines, 0)} -> {_ends(lines, -1)}",
        "skipped": f"{lines[-1]['skipped_records']} records, {lines[-1]['skipped_steps']} steps",
    }


def _ends(lines: list[dict[str, Any]], which: int) -> str:
    """Mean loss of the first or last steps that were not skipped."""
    losses = [line["loss"] for line in lines if math.isfinite(line["loss"])]
    count = max(1, len(losses) // 20)
    few = losses[:count] if which == 0 else losses[-count:]
    return f"{sum(few) / len(few):.4f}" if few else "none"
