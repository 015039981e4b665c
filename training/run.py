"""Train by a recipe: run or resume the trainer, write the model."""

import shutil
from pathlib import Path

import torch.distributed as dist

from training.assemble import Parts
from training.checkpoint import MODEL, replace_folder
from training.device import is_first, start_processes
from training.engines.deepspeed import DeepSpeedEngine
from training.loss import TrainedModel
from training.metrics import FlopCount
from training.recipes import Recipe
from training.records import StreamFeed
from training.trainer import Trainer


def train(recipe: Recipe, parts: Parts, out: Path, start: Path | None = None) -> Path:
    """Train `parts` by `recipe` in the folder `out`, from checkpoint `start` if given; the last checkpoint.

    The model is also written to out/model.
    Raises `training.interrupt.Interrupted`, after writing a checkpoint, on Ctrl-C or SIGTERM.
    """
    start_processes()
    flops = FlopCount(parts.model, parts.model.config)
    engine = DeepSpeedEngine(TrainedModel(parts.model), recipe)
    feed = StreamFeed(parts.samples, recipe.stream_length, recipe.seed)
    trainer = Trainer(recipe, out, engine, feed, parts, flops)
    if start is not None:
        trainer.load(start)
    checkpoint = trainer.fit()
    report_corrupt(parts)
    if is_first():
        export(parts, out / MODEL)
    dist.barrier()
    return checkpoint


def export(parts: Parts, folder: Path) -> None:
    """Model and processor in Hugging Face's layout; a folder of that name is replaced once all is written."""
    writing = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(writing, ignore_errors=True)
    parts.model.save_pretrained(writing)
    parts.processor.save_pretrained(writing)
    replace_folder(writing, folder)


def report_corrupt(parts: Parts) -> None:
    """Say which pictures no rank could read."""
    found: list[dict[Path, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, parts.reader.corrupt)
    corrupt = {path: reason for part in found for path, reason in part.items()}
    if corrupt and is_first():
        print(f"skipped {_plural(len(corrupt), 'corrupt picture')}:")
        for path, reason in sorted(corrupt.items()):
            print(f"  {path}: {reason}")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
