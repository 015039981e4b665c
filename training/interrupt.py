"""Ctrl-C and SIGTERM: note the signal, let the step finish, so that a checkpoint can be written first."""

import signal
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun passes a signal on to workers that a terminal has signalled already: the same request, come twice
REPEAT_SECONDS = 5.0


class Interrupted(Exception):
    """Training stopped on a signal; the checkpoint at `checkpoint` holds the run."""

    def __init__(self, number: int, step: int, checkpoint: str) -> None:
        self.number, self.step, self.checkpoint = number, step, checkpoint
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}; go on with: --resume {checkpoint}"
        )

    @property
    def exit_code(self) -> int:
        """128 + signal number, as a shell reports a process ended by it."""
        return 128 + self.number


class Watch:
    """Within `with Watch() as watch`, the first signal sets `watch.number`; one REPEAT_SECONDS later acts at once."""

    def __init__(self) -> None:
        self.number = 0
        self._noted_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Watch":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._noted_at = number, time.monotonic()
        elif time.monotonic() - self._noted_at > REPEAT_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
