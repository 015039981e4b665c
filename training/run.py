"""Train by a plan: one stage after the other, from random weights, a folder or a checkpoint; then write the model."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sail_model import SailVL2ForConditionalGeneration
from training import checkpoint, parallel
from training.assemble import Parts, freeze, open_loader, open_samples
from training.cli import Command
from training.data.loader import start_server
from training.data.streams import probe
from training.engines.deepspeed import DeepSpeedEngine
from training.lora import LoraOptions, merged, save_adapter, wrap
from training.metrics import FlopCount, peak_flops
from training.objectives.supervised import Supervised
from training.recipes import Recipe
from training.runlog import RunLog
from training.trainer import Place, Trainer

ADAPTER = "adapter"


def train(command: Command, parts: Parts) -> Path:
    """Train `parts` by the command's plan in its folder, from its checkpoint if it has one; the last checkpoint.

    The model is also written to out/model. Raises `training.interrupt.Interrupted`, after writing a checkpoint, on
    Ctrl-C or SIGTERM, and InputError where data or numbers end the run.
    """
    out, start = command.out, command.start
    plan = tuple(with_steps(recipe, parts) for recipe in command.plan)
    state = {"stage": 0, "step": 0, "total": 0} if start is None else start.state
    steps_before = state["total"] - state["step"]
    saved: Path | None = None
    peak = peak_flops(plan[0].dtype) * parallel.world()
    if any(recipe.workers for recipe in plan):
        start_server()  # beside the import of DeepSpeed
    with ExitStack() as stack:
        if parallel.is_first():
            stack.enter_context(checkpoint.only_run_in(out))
        log = stack.enter_context(
            RunLog(out, sum(recipe.steps for recipe in plan), state["total"], plan[0].log_every, peak)
        )
        for stage in range(state["stage"], len(plan)):
            place = Place(out, plan, stage, steps_before)
            saved = train_stage(place, parts, start if stage == state["stage"] else None, log)
            steps_before = checkpoint.read_state(saved)["total"]
        log.end()
    assert saved is not None, "a plan has at least one stage"
    return saved


def with_steps(recipe: Recipe, parts: Parts) -> Recipe:
    """The recipe with as many steps as its `epochs` take: their tokens, estimated, over those of a full step."""
    if not recipe.epochs:
        return recipe
    samples = open_samples(recipe, parts.processor)
    found = probe(samples, seed=recipe.seed, streams=recipe.streams)
    tokens = recipe.epochs * sum(samples.lengths) * found.tokens / found.records
    return replace(recipe, steps=max(1, round(tokens / (recipe.streams * recipe.stream_length))))


def train_stage(place: Place, parts: Parts, start: checkpoint.Start | None, log: RunLog) -> Path:
    """One stage, its engine made and taken apart; the checkpoint of its end."""
    recipe = place.recipe
    torch.manual_seed(recipe.seed)  # of LoRA's fresh factors: the same where a run was resumed in the stage before
    adapted = prepare(parts.model, recipe)
    flops = FlopCount(parts.model, parts.model.config)
    samples = open_samples(recipe, parts.processor)
    engine = DeepSpeedEngine(Supervised(parts.model), recipe)
    loader = open_loader(samples, recipe, parts.pad_id, rank=engine.data_rank, world=engine.data_world)
    try:
        trainer = Trainer(place, engine, loader, parts, samples.fingerprint, flops, log)
        if start is not None:
            trainer.load(start)
        saved = trainer.fit()
        if adapted is not None:
            export_adapter(adapted, place.out / ADAPTER)
            merged(adapted)  # in place
        export(parts, engine.weights() if adapted is None else None, place.out / checkpoint.MODEL)
        if recipe.zero_stage == 3:  # which leaves every rank with parts of weights
            parts.model = type(parts.model).from_pretrained(place.out / checkpoint.MODEL)
        return saved
    finally:
        loader.close()
        engine.close()


def prepare(model: SailVL2ForConditionalGeneration, recipe: Recipe) -> nn.Module | None:
    """Freeze what the recipe does not train. With LoRA: the PEFT model around `model`, whose layers it has replaced."""
    model.to(getattr(torch, recipe.dtype)).train()  # the stage before may have had another
    freeze(model, recipe)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if not recipe.lora_rank:
        return None
    text, vision = ("language" in recipe.parts), ("vision" in recipe.parts)
    options = LoraOptions(recipe.lora_rank, recipe.lora_alpha, 0.0, text, text, text, vision)
    adapted = wrap(model, options)
    for parameter in model.mlp1.parameters():  # small and often fresh: trained itself
        parameter.requires_grad_("adapter" in recipe.parts)
    return adapted


def export_adapter(adapted: nn.Module, folder: Path) -> None:
    """LoRA's factors apart from the model, as `export` writes that: equal on every rank, from the first alone."""

    def write(writing: Path) -> None:
        if parallel.is_first():
            save_adapter(adapted, writing)

    checkpoint.replace_from_ranks(folder, write)


def export(parts: Parts, weights: dict[str, Tensor] | None, folder: Path) -> None:
    """Model and processor in Hugging Face's layout; a folder of that name is replaced once all is written.

    Raises checkpoint.NotSaved.
    """

    def write(writing: Path) -> None:
        if parallel.is_first():
            parts.model.save_pretrained(writing, state_dict=weights)
            parts.processor.save_pretrained(writing)

    checkpoint.replace_from_ranks(folder, write)
