"""AdaLRS finds a better rate from one too low and one too high, keeps a good one, and goes on exactly when resumed."""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from training.adalrs import Action, AdaLRS, fit

WINDOW = 30
Observe = Callable[[AdaLRS, int, float], tuple[AdaLRS, Action]]


def observe(search: AdaLRS, step: int, loss: float) -> tuple[AdaLRS, Action]:
    return search, search.observe(step, loss)


def resumed_every_step(search: AdaLRS, step: int, loss: float) -> tuple[AdaLRS, Action]:
    return observe(AdaLRS.from_state(json.loads(json.dumps(search.state_dict()))), step, loss)


def optimize(
    rate: float, *, searching: bool, steps: int, watch: Observe = observe
) -> tuple[float, float, list[Action]]:
    """AdamW on an ill-conditioned least-squares problem with noise; final loss above the floor, final rate, actions."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-0.7, 0.3, 16)
    weights = torch.full((16,), 4.0, requires_grad=True)
    optimizer = torch.optim.AdamW([weights], lr=rate, weight_decay=0.0)
    search, actions, snapshot = AdaLRS(rate, window=WINDOW), [], None
    for step in range(steps):
        inputs = torch.randn(2048, 16, generator=generator) * scales
        noise = torch.randn(2048, generator=generator)
        loss = (inputs @ weights - noise).square().mean() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not searching:
            continue
        search, action = watch(search, step, float(loss.detach()))
        actions.append(action)
        state: Any = optimizer.state_dict()
        if action.kind == "try":
            snapshot = weights.detach().clone(), copy.deepcopy(state)
        if action.kind == "roll_back":
            assert snapshot is not None
            weights.data.copy_(snapshot[0])
            optimizer.load_state_dict(copy.deepcopy(snapshot[1]))
        optimizer.param_groups[0]["lr"] = action.rate
    return float((scales * weights.detach()).square().sum() / 2), search.rate, actions


def test_a_rate_too_low_is_raised() -> None:
    fixed, _, _ = optimize(1e-2, searching=False, steps=300)
    found, rate, actions = optimize(1e-2, searching=True, steps=300)
    assert rate > 2e-2 and found < 0.5 * fixed
    assert actions[WINDOW - 1] == Action("try", 1e-2 * 3.0)


def test_a_rate_too_high_is_lowered_and_rolled_back() -> None:
    fixed, _, _ = optimize(3.0, searching=False, steps=200)
    found, rate, actions = optimize(3.0, searching=True, steps=200)
    assert rate < 1.5 and found < 0.5 * fixed
    assert any(action.kind == "roll_back" for action in actions)


def test_a_good_rate_is_kept() -> None:
    """A rippled fall that no rate changes: every trial ends at the rate before it."""
    search = AdaLRS(1e-3, window=10)
    actions = [search.observe(step, 8.0 - 0.01 * step + 0.01 * (step % 2)) for step in range(400)]
    trials = [action for action in actions if action.kind == "try"]
    assert search.finished and len(trials) == 11 and search.rate == 1e-3
    assert [trial.rate for trial in trials] == [1e-3 * (0.9**t * 3.0) for t in range(11)]
    assert all(action.kind != "roll_back" for action in actions)


def test_a_better_trial_is_taken_and_a_worse_one_halves_the_rate() -> None:
    search = AdaLRS(1.0, window=4)
    line = [search.observe(step, 10.0 - 0.1 * step) for step in range(4)]
    assert line[-1] == Action("try", 3.0) and search.holds_snapshot
    assert [search.observe(step, 9.0 - 0.2 * step) for step in range(4, 8)][-1] == Action("keep", 3.0)
    assert not search.holds_snapshot
    assert [search.observe(step, 9.0 - 0.2 * step) for step in range(8, 12)][-1] == Action("try", 3.0 * (0.9 * 3.0))
    slower = [search.observe(step, 6.0 - 0.1 * step) for step in range(12, 16)][-1]
    assert slower == Action("roll_back", 3.0 / (0.9 * 2.0))


def test_a_jump_that_then_falls_fast_is_worse() -> None:
    search = AdaLRS(1.0, window=4)
    for step in range(4):
        search.observe(step, 10.0 - 0.1 * step)
    assert [search.observe(step, 50.0 - 5 * step) for step in range(4, 8)][-1] == Action("roll_back", 0.5)


def test_a_loss_that_is_not_finite_ends_a_trial_and_is_left_out_elsewhere() -> None:
    search = AdaLRS(1.0, window=3)
    actions = [search.observe(step, loss) for step, loss in enumerate((5.0, math.nan, 4.9, 4.8))]
    assert [action.kind for action in actions] == ["keep", "keep", "keep", "try"]
    assert search.observe(4, math.inf) == Action("roll_back", 0.5)


def test_a_trial_that_is_put_off_comes_after_another_window() -> None:
    search = AdaLRS(1.0, window=3)
    assert [search.observe(step, 5.0 - step).kind for step in range(3)] == ["keep", "keep", "try"]
    assert search.put_off() == Action("keep", 1.0)
    assert not search.holds_snapshot and search.rate == 1.0 and search.trials == 0
    assert AdaLRS.from_state(search.state_dict()) == search
    assert [search.observe(step, 5.0 - step) for step in range(3, 6)][-1] == Action("try", 3.0)


def test_a_resumed_search_goes_on_exactly() -> None:
    assert optimize(1e-2, searching=True, watch=resumed_every_step, steps=200) == optimize(
        1e-2, searching=True, steps=200
    )


def test_fit_is_the_least_squares_line() -> None:
    losses = [3.0, 2.5, 2.75, 1.0, 1.25]
    design = torch.stack([torch.arange(5.0, dtype=torch.float64), torch.ones(5, dtype=torch.float64)], 1)
    target = torch.tensor(losses, dtype=torch.float64)
    slope, start = torch.linalg.lstsq(design, target).solution
    variance = (target - design @ torch.stack([slope, start])).square().sum() / 3
    covariance = variance * torch.linalg.inv(design.T @ design)
    error, end_error = covariance[0, 0].sqrt(), (design[-1] @ covariance @ design[-1]).sqrt()
    found = torch.tensor(fit(losses), dtype=torch.float64)
    torch.testing.assert_close(found, torch.stack([-slope, error, start + 4 * slope, end_error]))


@pytest.mark.parametrize("bad", [{"rate": 0.0}, {"window": 2}, {"alpha": 1.0}, {"beta": 0.5}, {"decay": 1.0}])
def test_options_that_make_no_search_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="want rate > 0"):
        AdaLRS(**{"rate": 1.0, "window": 8} | bad)  # type: ignore[arg-type]


def test_a_step_seen_twice_is_refused() -> None:
    search = AdaLRS(1.0, window=8)
    search.observe(3, 1.0)
    with pytest.raises(ValueError, match="step 3 after that of step 3"):
        search.observe(3, 1.0)
