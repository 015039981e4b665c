"""The training loop: one step after the other, watched, logged, interruptible and resumable."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training import checkpoint
from training.assemble import Parts
from training.device import is_first, sum_over_ranks
from training.engines.deepspeed import DeepSpeedEngine
from training.interrupt import SIGNALS, Interrupted, Watch
from training.loss import balance_losses, label_count
from training.metrics import FlopCount, MetricsLog, activation_entropy, dense_matmul_rate
from training.packing import PackedBatch, pack
from training.progress import TrainingProgress
from training.recipes import Recipe
from training.records import StreamFeed
from training.schedule import cosine_with_warmup

METRICS = "metrics.jsonl"


@dataclass
class StepReport:
    """What one step did, over all ranks; `balance_M` and `entropy_M` hold a value for each expert layer."""

    loss: float
    tokens: int
    flops: float
    balance_M: list[float]
    entropy_M: list[float]
    skipped: int
    signal: int


class Trainer:
    """Runs `recipe.steps` steps of `engine` over `feed`, from wherever both stand."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        engine: DeepSpeedEngine,
        feed: StreamFeed,
        parts: Parts,
        flops: FlopCount,
    ) -> None:
        self.recipe, self.out, self.engine, self.feed, self.parts, self.flops = recipe, out, engine, feed, parts, flops
        self.dtype = getattr(torch, recipe.dtype)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.step = 0

    def fit(self) -> Path:
        """Train to the last step and return the final checkpoint.

        On SIGINT or SIGTERM every rank ends the same step, a checkpoint is written, and Interrupted is raised.
        """
        dense_rate = dense_matmul_rate(self.dtype, torch.device("cpu")) * self.world
        log = MetricsLog(self.out / METRICS, keep_steps=self.step) if is_first() else None
        saved = None
        with (
            Watch() as watch,
            TrainingProgress(self.recipe.steps, self.step, self.recipe.log_every, shown=is_first()) as progress,
        ):
            while self.step < self.recipe.steps:
                start = time.perf_counter()
                report = self._train_step(watch)
                seconds = time.perf_counter() - start
                figures = {"tokens_per_s": report.tokens / seconds, "mfu_like": report.flops / seconds / dense_rate}
                progress.update(self.step, report.loss, figures["tokens_per_s"], figures["mfu_like"])
                if log is not None:
                    log.write(self._line(report, seconds, figures))
                if report.signal or self.step % self.recipe.save_every == 0 or self.step == self.recipe.steps:
                    saved = self.save()
                if report.signal:
                    raise Interrupted(report.signal, self.step, str(saved))
        if log is not None:
            log.close()
        return saved or self.save()

    def save(self) -> Path:
        """Write a checkpoint of this moment and make it the latest."""
        state = {
            "step": self.step,
            "recipe": self.recipe.as_dict(),
            "feed": self.feed.state_dict(),
            "world": self.world,
            "data": self.parts.data,
            "versions": checkpoint.versions(),
        }

        def write(folder: Path) -> None:
            self.engine.save(folder)
            torch.save({"torch": torch.get_rng_state()}, folder / f"rng-{self.rank}.pt")
            if is_first():
                self.parts.processor.save_pretrained(folder / checkpoint.MODEL)
                self.parts.model.config.save_pretrained(folder / checkpoint.MODEL)

        root = self.out / checkpoint.FOLDER
        return checkpoint.publish(root, self.step, state, write, is_first=is_first(), barrier=dist.barrier)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint: weights, optimizer, data order, random numbers, step.

        Raises InputError where it was written by another number of processes.
        """
        state = checkpoint.read_state(folder)
        checkpoint.check_world(folder, state, self.world)
        then, now = state["versions"], checkpoint.versions()
        changed = [f"{name} {then.get(name)}, now {now[name]}" for name in now if then.get(name) != now[name]]
        if changed and is_first():
            print(f"{folder}: written with {'; '.join(changed)}: the curve may differ by rounding")
        self.engine.load(folder)
        self.feed.load_state_dict(state["feed"])
        torch.set_rng_state(torch.load(folder / f"rng-{self.rank}.pt")["torch"])
        self.step = state["step"]

    def _train_step(self, watch: Watch) -> StepReport:
        micros = [self._batch(streams) for streams in self._next_micro_batches()]
        (labels,) = sum_over_ranks([float(sum(label_count(batch) for batch, *_ in micros))])
        lr = learning_rate(self.recipe, self.step)
        totals, counts, balances = [0.0] * 5, [], []
        for batch, pixels, skipped in micros:
            out = self.engine.forward(batch, pixels)
            tokens = int(batch.token_mask().sum())
            balance_M = balance_losses(out.counts_ME, out.prob_sum_ME, tokens, dist.group.WORLD)
            # the engine takes the mean over ranks and micro-batches; this turns it into the mean over all labels
            share = self.world * len(micros) / max(1.0, labels)
            self.engine.backward(out.answer_loss_sum * share + self.recipe.balance * _mean(balance_M))
            self.engine.step(lr)
            pairs = batch.attention.pairs()
            done = (float(out.answer_loss_sum.detach()), tokens, pairs, len(batch.pictures), skipped)
            totals = [total + value for total, value in zip(totals, done, strict=True)]
            counts.append(out.counts_ME)
            balances.append(balance_M.detach())
        self.step += 1
        return self._report(totals, torch.stack(counts).sum(0), torch.stack(balances).mean(0), labels, watch)

    def _report(
        self, totals: list[float], counts_ME: Tensor, balance_M: Tensor, labels: float, watch: Watch
    ) -> StepReport:
        signals = [float(watch.number == number) for number in SIGNALS]
        summed = sum_over_ranks([*totals, *signals, *counts_ME.double().flatten().tolist()])
        loss_sum, tokens, pairs, pictures, skipped = summed[:5]
        seen = [number for number, count in zip(SIGNALS, summed[5:7], strict=True) if count]
        counts = torch.tensor(summed[7:]).view(counts_ME.shape)
        return StepReport(
            loss=loss_sum / max(1.0, labels),
            tokens=int(tokens),
            flops=self.flops.step(int(tokens), int(labels), int(pairs), int(pictures)),
            balance_M=balance_M.tolist(),
            entropy_M=[activation_entropy(counts_E) for counts_E in counts],
            skipped=int(skipped),
            signal=seen[0] if seen else 0,
        )

    def _next_micro_batches(self) -> list[list[list[Any]]]:
        """This rank's streams of each micro-batch; all ranks together read a step's streams in order."""
        width = self.recipe.streams
        streams = self.feed.next(self.recipe.micro_batches * self.world * width)
        starts = [(micro * self.world + self.rank) * width for micro in range(self.recipe.micro_batches)]
        return [streams[start : start + width] for start in starts]

    def _batch(self, streams: list[list[Any]]) -> tuple[PackedBatch, Tensor, int]:
        batch = pack(streams, self.parts.pad_id)
        pixels, skipped = self.parts.reader.fill(batch, blank=self.recipe.blank_pictures)
        return batch, pixels.to(self.dtype), skipped

    def _line(self, report: StepReport, seconds: float, figures: dict[str, float]) -> dict[str, Any]:
        return {
            "step": self.step,
            "loss": report.loss,
            "balance_loss": report.balance_M,
            "expert_entropy": report.entropy_M,
            "grad_norm": self.engine.grad_norm(),
            "tokens": report.tokens,
            "seconds": seconds,
            "skipped_pictures": report.skipped,
            **figures,
        }


def learning_rate(recipe: Recipe, step: int) -> float:
    """Warm-up, then a cosine down to 2% of the peak."""
    return cosine_with_warmup(step, peak=recipe.lr, warmup=recipe.warmup, steps=recipe.steps, floor=0.02 * recipe.lr)


def _mean(balance_M: Tensor) -> Tensor:
    return balance_M.mean() if balance_M.numel() else balance_M.sum()
