"""AdaLRS: search the peak learning rate while training, by how fast the loss falls. No model or engine in here.

Source: SAIL-VL2 report (arXiv 2509.14033), section 4.2; AdaLRS (arXiv 2506.13274).
Values that the sources leave open are ours: docs/decisions, training-tools-adalrs.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple


class Action(NamedTuple):
    """What the trainer does before its next step, which it takes with peak learning rate `rate`.

    "keep": go on.  "try": save model and optimizer first, `rate` is a trial.  "roll_back": bring back model and
    optimizer as that snapshot has them; data and the count of steps go on.
    """

    kind: Literal["keep", "try", "roll_back"]
    rate: float


class Fit(NamedTuple):
    """A least-squares line through the losses of a window."""

    velocity: float  # how much the loss falls in a step: minus the slope
    error: float  # standard error of the velocity
    end: float  # loss of the line at the window's last step
    end_error: float  # its standard error


def fit(losses: list[float]) -> Fit:
    """v = -sum (i - mean i)(l_i - mean l) / sum (i - mean i)^2, with its standard error; at least 3 losses."""
    n = len(losses)
    middle, mean = (n - 1) / 2, math.fsum(losses) / n
    spread = n * (n * n - 1) / 12
    slope = math.fsum((i - middle) * (loss - mean) for i, loss in enumerate(losses)) / spread
    residual = math.fsum((loss - mean - slope * (i - middle)) ** 2 for i, loss in enumerate(losses))
    variance = residual / (n - 2)
    end, end_variance = mean + slope * middle, variance * (1 / n + middle**2 / spread)
    return Fit(-slope, math.sqrt(variance / spread), end, math.sqrt(end_variance))


@dataclass
class AdaLRS:
    """eta <- alpha' eta where v(alpha' eta) > v(eta) + 2e; roll back and beta' eta where it is < v(eta) - 2e.

    alpha' = max(decay^t alpha, 1), beta' = 1 / max(decay^t beta, 1), t trials done. v is `fit`'s velocity over
    `window` steps: one window at eta, one at alpha' eta, and so on until alpha' is 1. e is the standard error of the
    difference of both velocities. A trial also counts as worse where its line ends above that of the window before
    it, by two standard errors too: after a jump the loss falls fast, and is worse all the same.

    `state_dict` is JSON; a controller that loads it goes on exactly. While `holds_snapshot`, the trainer keeps the
    snapshot, in a checkpoint too. Raises ValueError for options that make no search.
    """

    rate: float
    window: int
    alpha: float = 3.0
    beta: float = 2.0
    decay: float = 0.9
    trials: int = 0
    base: float | None = None  # the rate that a running trial is compared with
    losses: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)  # the window at `base`
    last_step: int = -1

    def __post_init__(self) -> None:
        if not (self.rate > 0 and self.window >= 3 and self.alpha > 1 and self.beta > 1 and 0 < self.decay < 1):
            raise ValueError(
                f"AdaLRS: got rate={self.rate}, window={self.window}, alpha={self.alpha}, beta={self.beta},"
                f" decay={self.decay}; want rate > 0, window >= 3, alpha > 1, beta > 1 and decay between 0 and 1"
            )

    @property
    def holds_snapshot(self) -> bool:
        """Whether a trial runs, which may ask for its snapshot."""
        return self.base is not None

    @property
    def finished(self) -> bool:
        """Whether alpha' has come down to 1: `rate` stays."""
        return self.base is None and self._up() <= 1

    def observe(self, step: int, loss: float) -> Action:
        """Take the loss of step `step`, which was taken with `rate`; call it from the end of warm-up on.

        A loss that is not finite ends a trial; elsewhere it is left out, as the engine updated nothing.
        Raises ValueError for a step that is not after the last one.
        """
        if step <= self.last_step:
            raise ValueError(f"AdaLRS: got the loss of step {step} after that of step {self.last_step}")
        self.last_step = step
        if not math.isfinite(loss):
            return self._settle(worse=True) if self.base is not None else Action("keep", self.rate)
        if self.finished:
            return Action("keep", self.rate)
        self.losses.append(loss)
        if len(self.losses) < self.window:
            return Action("keep", self.rate)
        if self.base is None:
            self.base, self.rate = self.rate, self.rate * self._up()
            self.before, self.losses = self.losses, []
            return Action("try", self.rate)
        old, new = fit(self.before), fit(self.losses)
        margin = 2 * math.hypot(old.error, new.error)
        above = new.end > old.end + 2 * math.hypot(old.end_error, new.end_error)
        worse = new.velocity < old.velocity - margin or above
        return self._settle(worse, better=new.velocity > old.velocity + margin)

    def put_off(self) -> Action:
        """Take back the trial that `observe` has just asked for, as its snapshot cannot be written: a window later."""
        assert self.base is not None and not self.losses
        self.rate, self.base, self.before = self.base, None, []
        return Action("keep", self.rate)

    def _settle(self, worse: bool, better: bool = False) -> Action:
        """End the trial: its rate, the rate before, or a lower one from the snapshot."""
        assert self.base is not None
        if worse:
            self.rate = self.base / max(self.decay**self.trials * self.beta, 1.0)
        elif not better:
            self.rate = self.base
        self.trials += 1
        self.base, self.before, self.losses = None, [], []
        return Action("roll_back" if worse else "keep", self.rate)

    def _up(self) -> float:
        return max(self.decay**self.trials * self.alpha, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "AdaLRS":
        """The controller that `state_dict` described."""
        return cls(**state)
