"""What the user sees while training: a rich bar on a terminal, one line now and then elsewhere."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

FIGURES = "loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} tokens/s  MFU-like {task.fields[mfu]:.1%}"


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
        self._task = self._bar.add_task("", total=steps, completed=start, loss=float("nan"), rate=0.0, mfu=0.0)

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float, rate: float, mfu: float) -> None:
        """Show that `step` steps are done, the loss of the last, tokens a second and the share of dense mm."""
        self._bar.update(self._task, completed=step, loss=loss, rate=rate, mfu=mfu)
        if not self.console.is_terminal and (step % self.log_every == 0 or step == self.steps):
            self.say(f"step {step}/{self.steps}  loss {loss:.4f}  {rate:,.0f} tokens/s  MFU-like {mfu:.1%}")

    def say(self, text: str) -> None:
        """One line above the bar."""
        self.console.print(text, soft_wrap=True)
