"""What the user sees while training: a rich bar on a terminal, one line now and then elsewhere; a table at the end."""

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
    """Of each stage of a run, what it did and how fast; `seconds` is this process's time, the rest the run's."""
    table = Table(
        "stage", "steps", "tokens", "time", "tokens/s", "MFU", "waited for data", "padding", "loss", "skipped"
    )
    lines = read_lines(metrics)
    for stage in dict.fromkeys(line["stage"] for line in lines):
        own = [line for line in lines if line["stage"] == stage]
        took, tokens = (sum(line[name] for line in own) for name in ("seconds", "tokens"))
        share = {name: sum(line[name] * line["seconds"] for line in own) / took for name in ("mfu", "data_wait")}
        padding = sum(line["padding"] for line in own) / len(own)
        skipped = f"{own[-1]['skipped_records']} records, {own[-1]['skipped_steps']} steps"
        table.add_row(
            *(stage, f"{len(own):,}", f"{tokens:,}", f"{took:,.0f} s", f"{tokens / took:,.0f}", f"{share['mfu']:.1%}"),
            *(f"{share['data_wait']:.1%}", f"{padding:.1%}", f"{_ends(own, 0)} -> {_ends(own, -1)}", skipped),
        )
    table.caption = f"{seconds:,.0f} s, peak memory {peak_memory() / 2**30:.1f} GiB"
    return table


def _ends(lines: list[dict[str, Any]], which: int) -> str:
    """Mean loss of the first or last steps."""
    few = lines[: max(1, len(lines) // 20)] if which == 0 else lines[-max(1, len(lines) // 20) :]
    return f"{sum(line['loss'] for line in few) / len(few):.4f}"
