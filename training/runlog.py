"""What a run says while it goes on: metrics.jsonl, TensorBoard, a bar or lines; at its end a table."""

import time
from pathlib import Path
from types import TracebackType
from typing import Any

from training import parallel
from training.metrics import MetricsLog
from training.progress import TrainingProgress, closing_table
from training.tensorboard import TensorBoard

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class RunLog:
    """One for all stages of a run, from step `done` of `steps` on; use as a context. Silent but on the first rank.

    `peak_flops` is what MFU is a share of: FLOP/s of all devices together.
    """

    def __init__(self, out: Path, steps: int, done: int, log_every: int, peak_flops: float) -> None:
        self.out, self.steps, self.peak_flops = out, steps, peak_flops
        self.began = time.perf_counter()
        first = parallel.is_first()
        self._metrics = MetricsLog(out / METRICS, keep_steps=done) if first else None
        self._board = TensorBoard(out / TENSORBOARD, keep_steps=done) if first else None
        self._progress = TrainingProgress(steps, done, log_every, shown=first)

    def __enter__(self) -> "RunLog":
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, value, trace)
        for log in (self._metrics, self._board):
            if log is not None:
                try:
                    log.close()
                except OSError as error:
                    self.say(f"{self.out}: the last steps are not in {METRICS} or {TENSORBOARD}: {error}")

    def write(self, line: dict[str, Any], flops: float) -> None:
        """One step's line, with tokens/s and MFU made from its `tokens`, `seconds` and `flops`."""
        line["tokens_per_s"] = line["tokens"] / line["seconds"]
        line["mfu"] = flops / line["seconds"] / self.peak_flops
        self._progress.update(line)
        if self._metrics is not None:
            try:
                self._metrics.write(line)
            except OSError as error:
                self.say(f"step {line['step']}: {METRICS}: {error}; its lines wait for room, training goes on")
        if self._board is not None:
            try:
                self._board.write(line)
            except OSError as error:
                self._board = None
                self.say(f"step {line['step']}: {TENSORBOARD}: {error}; training goes on without it")

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._progress.say(text)

    def end(self) -> None:
        """The table of the whole run, resumed parts included."""
        if parallel.is_first():
            self._progress.console.print(closing_table(self.out / METRICS, time.perf_counter() - self.began))
