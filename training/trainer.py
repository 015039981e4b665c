"""One stage of training: step after step, watched, logged, interruptible and resumable."""

import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from training import checkpoint, parallel
from training.adalrs import Action, AdaLRS
from training.assemble import Parts
from training.data.loader import LoadedStep, StreamLoader, WorkerDied
from training.engines.engine import Engine, StepResult
from training.errors import InputError
from training.faults import BadRecords, NotFinite, reporting_a_lost_process
from training.interrupt import SIGNALS, Interrupted, Watch
from training.metrics import FlopCount, activation_entropy
from training.recipes import Recipe
from training.runlog import RunLog
from training.schedule import cosine_with_warmup

ENGINE = "engine"
RECENT = 20  # steps whose mean loss may end a stage
ADALRS = "adalrs"  # the snapshot that a trial of a learning rate may go back to


class Place(NamedTuple):
    """Where in a run: its folder, its stages, which of them this is, and the steps of those before it."""

    out: Path
    plan: tuple[Recipe, ...]
    stage: int
    steps_before: int

    @property
    def recipe(self) -> Recipe:
        """Of this stage."""
        return self.plan[self.stage]


class Sums(NamedTuple):
    """Of one step, over all data-parallel ranks; `signal` is one that any of them got, or 0."""

    tokens: int
    pairs: int
    tiles: int
    records: int
    faults: int
    waited: float  # seconds, mean over ranks
    signal: int


class Trainer:
    """Runs the steps of a stage with `engine` over `loader`, from wherever both stand."""

    def __init__(
        self,
        place: Place,
        engine: Engine,
        loader: StreamLoader,
        parts: Parts,
        data: list[dict[str, Any]],
        flops: FlopCount,
        log: RunLog,
    ) -> None:
        self.place, self.engine, self.loader, self.parts, self.log = place, engine, loader, parts, log
        self.recipe, self.data, self.flops = place.recipe, data, flops
        self.step = 0
        self.peak = self.recipe.lr
        self.adalrs = AdaLRS(self.recipe.lr, self.recipe.adalrs_window) if self.recipe.adalrs else None
        self.bad, self.not_finite = BadRecords(self.recipe.max_bad), NotFinite(self.recipe.max_not_finite)
        self.recent: list[float] = []  # losses
        self.saved: Path | None = None
        self._feed = loader.state_dict()  # behind the last step that was trained

    def fit(self) -> Path:
        """Train to the stage's last step; the checkpoint of its end.

        On SIGINT or SIGTERM every rank ends the same step, a checkpoint is written, and Interrupted is raised. Raises
        InputError, after a checkpoint, where too many records or steps in a row cannot be used.
        """
        with Watch() as watch, reporting_a_lost_process():
            while not self.is_done:
                with self._saving_first():
                    loaded = self._load()
                signal = self._one_step(loaded, watch)
                with self._saving_first():
                    self.bad.check()
                    self._check_finite()
                if signal or self.is_done:
                    self.save()
                elif self.step % self.recipe.save_every == 0:
                    self._save_if_possible()
                if signal:
                    raise Interrupted(signal, self._total(), str(self.saved))
        return self.saved or self.save()

    @property
    def is_done(self) -> bool:
        """Whether the stage has made its steps, or its loss has come down to where it may end."""
        below = len(self.recent) == RECENT and sum(self.recent) / RECENT < self.recipe.until_loss
        return below or self.step >= self.recipe.steps

    def _load(self) -> LoadedStep:
        """The next step's data. Raises InputError on all ranks where one has none, so that all can save first."""
        failed, loaded = "", None
        try:
            loaded = self.loader.next()
        except (InputError, WorkerDied) as error:
            failed = f"process {parallel.rank()}: {error}"
        if sum(parallel.sum_over_ranks([float(loaded is None)])):
            raise InputError("; ".join(filter(None, parallel.gather_objects(failed))))
        assert loaded is not None
        return loaded

    def _one_step(self, loaded: LoadedStep, watch: Watch) -> int:
        began = time.perf_counter() - loaded.waited
        lr = learning_rate(self.recipe, self.step, self.peak)
        result = self.engine.train_step(loaded.batches, lr)
        self.step += 1
        self._feed = self.loader.state_dict()
        sums = self._sums(loaded, watch)
        for message in self.bad.add(sums.records, self._faults(loaded, sums)):
            self.log.say(message)
        self.not_finite.add(result.finite)
        self.recent = [*self.recent, result.loss][-RECENT:]
        flops = self.flops.step(sums.tokens, result.labels, sums.pairs, sums.tiles)
        self.log.write(self._line(result, sums, loaded, time.perf_counter() - began, lr), flops)
        if self.adalrs is not None:
            self._adjust_rate(self.adalrs, result.loss if result.finite else math.inf)
        return sums.signal

    def _sums(self, loaded: LoadedStep, watch: Watch) -> Sums:
        batches, signals = loaded.batches, [float(watch.number == number) for number in SIGNALS]
        own = [
            *(float(sum(getattr(batch, name) for batch in batches)) for name in ("tokens", "pairs")),
            *(float(sum(len(batch.pixels) for batch in batches)), float(loaded.records), float(len(loaded.faults))),
            *(loaded.waited, *signals),
        ]
        tokens, pairs, tiles, records, faults, waited, *seen = parallel.sum_over_ranks(own)
        caught = [number for number, count in zip(SIGNALS, seen, strict=True) if count]
        return Sums(
            int(tokens),
            int(pairs),
            int(tiles),
            int(records),
            int(faults),
            waited=waited / parallel.world(),
            signal=caught[0] if caught else 0,
        )

    def _faults(self, loaded: LoadedStep, sums: Sums) -> list[tuple[str, str]]:
        """Of all ranks, in their order."""
        return [fault for part in parallel.gather_objects(loaded.faults) for fault in part] if sums.faults else []

    def _line(self, result: StepResult, sums: Sums, loaded: LoadedStep, seconds: float, lr: float) -> dict[str, Any]:
        return {
            "step": self._total(),
            "stage": self.recipe.name,
            "loss": result.loss,
            "lr": lr,
            "balance_loss": result.balance_M,
            "expert_entropy": [activation_entropy(counts_E) for counts_E in result.counts_ME],
            "grad_norm": result.grad_norm,
            "labels": result.labels,
            "tokens": sums.tokens,
            "seconds": seconds,
            "data_wait": sums.waited / seconds,
            "padding": loaded.padding,
            "tiles": sums.tiles,
            "skipped_records": self.bad.bad,
            "skipped_steps": self.not_finite.total,
        }

    def _adjust_rate(self, adalrs: AdaLRS, loss: float) -> None:
        """A trial of another peak starts from a snapshot; where it does worse, weights and optimizer go back to it."""
        if self.step <= self.recipe.warmup:
            return
        action = adalrs.observe(self.step, loss)
        if action.kind == "try":
            action = self._snapshot_for(adalrs, action)
        elif action.kind == "roll_back":
            self.engine.load(self._snapshot)
        if action.rate != self.peak:
            self.log.say(f"step {self._total()}: AdaLRS: peak learning rate {self.peak:.3g} -> {action.rate:.3g}")
            self.peak = action.rate

    def _snapshot_for(self, adalrs: AdaLRS, trial: Action) -> Action:
        """A full disk is no reason to end the run: without a snapshot the trial waits, at the rate before it."""
        try:
            checkpoint.replace_from_ranks(self._snapshot, self.engine.save)
        except checkpoint.NotSaved as error:
            self.log.say(f"step {self._total()}: AdaLRS: {error}; the trial of another learning rate is put off")
            return adalrs.put_off()
        return trial

    @property
    def _snapshot(self) -> Path:
        return self.place.out / checkpoint.FOLDER / ADALRS

    @contextmanager
    def _saving_first(self) -> Iterator[None]:
        """Before an error of the data or of the numbers ends the run, what it has learned is written."""
        try:
            yield
        except InputError as error:
            try:
                saved = self.save()
            except checkpoint.NotSaved as failed:
                raise InputError(f"{error}; {failed}") from error
            raise InputError(f"{error}; go on with: --resume {saved}") from error

    def _check_finite(self) -> None:
        if self.not_finite.too_many:
            raise InputError(
                f"{self.not_finite.in_a_row} steps in a row had a loss or gradient that is not finite and changed"
                f" nothing; the checkpoint holds the weights from before. Lower --lr or look at the data"
            )

    def _total(self) -> int:
        return self.place.steps_before + self.step

    def save(self) -> Path:
        """Write a checkpoint of this moment and make it the latest. Raises checkpoint.NotSaved."""
        streams = parallel.gather_objects(self._feed)
        state = {
            "stage": self.place.stage,
            "step": self.step,
            "total": self._total(),
            "plan": [recipe.as_dict() for recipe in self.place.plan],
            "feed": {name: state for part in streams for name, state in part.items()},
            "bad": self.bad.state_dict(),
            "not_finite": self.not_finite.state_dict(),
            "peak": self.peak,
            "recent": self.recent,
            "adalrs": None if self.adalrs is None else self.adalrs.state_dict(),
            "world": parallel.world(),
            "data": self.data,
            "versions": checkpoint.versions(),
        }
        root = self.place.out / checkpoint.FOLDER
        self.saved = checkpoint.publish(root, self._total(), state, self._write, keep=self.recipe.keep)
        return self.saved

    def _save_if_possible(self) -> None:
        """A full disk is no reason to lose what has been learned since: training goes on, and the next one may fit."""
        try:
            self.save()
        except checkpoint.NotSaved as error:
            self.log.say(f"step {self._total()}: {error}; training goes on, the latest is still {self.saved}")

    def _write(self, folder: Path) -> None:
        self.engine.save(folder / ENGINE)
        if parallel.is_first():
            self.parts.processor.save_pretrained(folder / checkpoint.MODEL)
            self.parts.model.config.save_pretrained(folder / checkpoint.MODEL)
            if self.adalrs is not None and self.adalrs.holds_snapshot:
                shutil.copytree(self._snapshot, folder / ADALRS, copy_function=os.link)

    def load(self, start: checkpoint.Start) -> None:
        """Go on from a checkpoint: weights, optimizer, data order, random numbers, step."""
        folder, state = start
        then, now = state["versions"], checkpoint.versions()
        changed = [f"{name} {then.get(name)}, now {now[name]}" for name in now if then.get(name) != now[name]]
        if changed:
            self.log.say(f"{folder}: written with {'; '.join(changed)}: the curve may differ by rounding")
        checkpoint.check_data(start, self.recipe.data, self.data)
        with checkpoint.reading(folder):
            self.engine.load(folder / ENGINE)
            self.loader.load_state_dict(state["feed"])
            self.bad.load_state_dict(state["bad"])
            self.not_finite.load_state_dict(state["not_finite"])
            if self.adalrs is not None:
                self.adalrs = AdaLRS.from_state(state["adalrs"])
                if self.adalrs.holds_snapshot and parallel.is_first():
                    self._keep_snapshot(folder)
        self._feed = self.loader.state_dict()
        self.step, self.peak, self.recent, self.saved = state["step"], state["peak"], state["recent"], folder

    def _keep_snapshot(self, folder: Path) -> None:
        """The snapshot of a trial that the checkpoint was written in, where the trial will look for it."""
        shutil.rmtree(self._snapshot, ignore_errors=True)
        shutil.copytree(folder / ADALRS, self._snapshot, copy_function=os.link)


def learning_rate(recipe: Recipe, step: int, peak: float) -> float:
    """Warm-up to `peak`, then constant or a cosine down to a share of it."""
    if recipe.schedule == "constant":
        return peak * min(1.0, (step + 1) / max(1, recipe.warmup))
    return cosine_with_warmup(step, peak=peak, warmup=recipe.warmup, steps=recipe.steps, floor=recipe.lr_floor * peak)
