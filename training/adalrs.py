"""AdaLRS: search the learning rate while training, by how fast the loss falls.

v is minus the least-squares slope of the loss over a window of k steps. Every other window a trial runs at eta * a with
a = max(lambda^t alpha, 1) after t trials; it is kept where v(trial) > v(before) + 2e. Where v(trial) < v(before) - 2e,
weights and optimizer go back to before the trial, and training goes on at eta * b, b = 1 / max(lambda^t beta, 1). Else
eta stays. A rate that diverges is a trial that failed. Source: SAIL-VL2 report, section 4.2; arXiv 2506.13274.

The report gives neither alpha, beta, lambda, k nor e. Ours: its rates, 2e-4 to 6.75e-4, are (3/2)^3 apart, so alpha = 3
and beta = 2 (coprime, as it asks); lambda 0.9; k 50 steps; e is the standard error of the slope, so that a trial must
beat the noise.
"""

import math
from typing import Any, NamedTuple


class Action(NamedTuple):
    """What to do before the next step: take a snapshot, or go back to the last one, and the peak rate from now on."""

    rate: float
    snapshot: bool = False
    roll_back: bool = False


class AdaLRS:
    """Feed `observe` every step's loss; the engine is the caller's."""

    def __init__(
        self, rate: float, *, window: int = 50, up: float = 3.0, down: float = 2.0, decay: float = 0.9, trials: int = 12
    ) -> None:
        self.rate, self.window, self.up, self.down, self.decay, self.trials = rate, window, up, down, decay, trials
        self.done = 0  # trials
        self.before: tuple[float, float] | None = None  # speed and its error in the window before a trial
        self.tried = rate
        self.losses: list[float] = []

    @property
    def in_trial(self) -> bool:
        """Whether a snapshot is needed to go back to."""
        return self.before is not None

    def observe(self, step: int, loss: float) -> Action:
        """After a step. A loss that is not finite ends a trial at once, and counts for nothing else."""
        if not math.isfinite(loss):
            return self._end_trial(failed=True, improved=False) if self.in_trial else Action(self.rate)
        self.losses.append(loss)
        if len(self.losses) < self.window or self.done >= self.trials:
            self.losses = self.losses[-self.window :]
            return Action(self.tried if self.in_trial else self.rate)
        speed, error = slope(self.losses)
        if self.before is None:
            return self._begin_trial(-speed, error)
        was, was_error = self.before
        margin = 2 * max(error, was_error)
        return self._end_trial(failed=-speed < was - margin, improved=-speed > was + margin)

    def _begin_trial(self, speed: float, error: float) -> Action:
        factor = max(self.decay**self.done * self.up, 1.0)
        if factor <= 1.0:
            self.done = self.trials
            return Action(self.rate)
        self.before, self.tried, self.losses = (speed, error), self.rate * factor, []
        return Action(self.tried, snapshot=True)

    def _end_trial(self, *, failed: bool, improved: bool) -> Action:
        if improved:
            self.rate = self.tried
        elif failed:
            self.rate /= max(self.decay**self.done * self.down, 1.0)
        self.done, self.before, self.losses = self.done + 1, None, []
        self.tried = self.rate
        return Action(self.rate, roll_back=failed)

    def state_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("rate", "done", "before", "tried", "losses")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, value in state.items():
            setattr(self, name, tuple(value) if name == "before" and value is not None else value)


def slope(values: list[float]) -> tuple[float, float]:
    """Least-squares slope of equally spaced values, and its standard error."""
    n = len(values)
    middle, mean = (n - 1) / 2, sum(values) / n
    spread = sum((i - middle) ** 2 for i in range(n))
    found = sum((i - middle) * (value - mean) for i, value in enumerate(values)) / spread
    left = sum((value - mean - found * (i - middle)) ** 2 for i, value in enumerate(values))
    return found, math.sqrt(left / max(1, n - 2) / spread)
