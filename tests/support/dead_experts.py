"""Run by test_training_run.py under torchrun: ZeRO-2 and stage 0, each rank's tokens on experts of its own."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from tiny_model import lively_model, pixels, prompt, tiny_config

import sail_ops
from training.device import start_processes, stop_processes
from training.engines.deepspeed import DeepSpeedEngine
from training.loss import TrainedModel
from training.packing import IGNORE, Branch, Sample, pack
from training.recipes import Recipe

EXPERTS, STEPS = 8, 4
route_topk = sail_ops.route_topk


def own_half(logits_TE: torch.Tensor, k: int, **options: Any) -> sail_ops.Routing:
    """Rank 0 routes to the first half of the experts, rank 1 to the second."""
    bias_E = torch.full((EXPERTS,), -1e4)
    bias_E[dist.get_rank() * EXPERTS // 2 :][: EXPERTS // 2] = 0
    return route_topk(logits_TE, k, bias_E=bias_E, **options)


def losses(stage: int) -> tuple[list[float], list[int]]:
    """Mean loss over ranks of each step, and how many experts of each layer this rank left without a token."""
    recipe = Recipe(zero_stage=stage, streams=1, weight_decay=0.0)
    engine = DeepSpeedEngine(TrainedModel(lively_model(tiny_config(moe=True, num_hidden_layers=2))), recipe)
    ids = prompt(tiles=1, words=40, seed=dist.get_rank()).tolist()
    branch = Branch(tuple(ids[6:]), (IGNORE, *ids[7:]))
    batch = pack([[Sample("picture", tuple(ids[:6]), (branch,))]], pad_id=0)
    found, dead = [], []
    for _ in range(STEPS):
        out = engine.forward(batch, pixels(1, seed=dist.get_rank()))
        loss = out.answer_loss_sum / len(branch.ids)
        engine.backward(loss)
        engine.step(1e-2)
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        found.append(mean.item() / dist.get_world_size())
        dead = (out.counts_ME == 0).sum(1).tolist()
    return found, dead


def main() -> None:
    """Both stages from the same weights; the first rank writes what they gave."""
    start_processes()
    with patch.object(sail_ops, "route_topk", own_half):
        stage_0, _ = losses(0)
        zero_2, dead = losses(2)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dead)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps({"stage_0": stage_0, "zero_2": zero_2, "dead": everyone}))
    dist.barrier()
    stop_processes()


if __name__ == "__main__":
    main()
