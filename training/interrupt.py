"""Ctrl-C, SIGTERM, SIGHUP: note the signal, let the step finish, so that a checkpoint can be written first."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAUNCHED = "TORCHELASTIC_RUN_ID"  # set by torchrun
_PARENT = os.getppid()
# torchrun passes a signal on to workers that a terminal has signalled already: the same request, come twice
REPEAT_SECONDS = 5.0


def launcher_ended() -> bool:
    """Whether torchrun, which started this process, is gone."""
    return LAUNCHED in os.environ and os.getppid() != _PARENT


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
    """Within `with Watch() as watch`, the first signal sets `watch.number`; one REPEAT_SECONDS later acts at once.

    A SIGHUP that was ignored (nohup) stays so. The end of torchrun, without which nobody would ever end its processes,
    counts as one.
    """

    def __init__(self) -> None:
        self._number = 0
        self._noted_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Watch":
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    @property
    def number(self) -> int:
        """Of the first signal; 0 before."""
        if not self._number and launcher_ended():
            self._number = signal.SIGHUP
        return self._number

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._number:
            self._number, self._noted_at = number, time.monotonic()
        elif time.monotonic() - self._noted_at > REPEAT_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
