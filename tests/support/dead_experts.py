"""Run by test_training_run.py: steps in which a rank's tokens miss experts, or its loss misses the routers too.

    torchrun --nproc_per_node=2 dead_experts.py OUT 2      two ranks, a batch each, under ZeRO-2
    python dead_experts.py OUT 0                           one process, both batches as micro-batches, without ZeRO

OUT is a file for losses, weights, and how many experts of each layer a batch left without a token.
"""

import sys
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from tiny_model import lively_model, pixels, prompt, tiny_config
from training.device import start_processes, stop_processes
from training.loss import TrainedModel
from training.packing import IGNORE, Branch, PackedBatch, Sample, pack

import sail_ops
from training.engines.deepspeed import DeepSpeedEngine
from training.recipes import Recipe

EXPERTS, STEPS, BATCHES = 8, 4, 2
route_topk = sail_ops.route_topk


def batch_of(number: int, step: int) -> tuple[PackedBatch[str], int]:
    """Batch and labels it should have; in every other step the second batch has none, so nothing gets a gradient."""
    ids = prompt(tiles=1, words=40, seed=number).tolist()
    answers = tuple(ids[7:]) if number == 0 or step % 2 == 0 else (IGNORE,) * len(ids[7:])
    branch = Branch(tuple(ids[6:]), (IGNORE, *answers))
    return pack([[Sample("picture", tuple(ids[:6]), (branch,))]], pad_id=0), len(ids) - 6


def own_half(number: int) -> Any:
    """A router whose tokens go to the first half of the experts in the first batch, to the second in the second."""
    bias_E = torch.full((EXPERTS,), -1e4)
    bias_E[number * EXPERTS // 2 :][: EXPERTS // 2] = 0
    return lambda logits_TE, k, **options: route_topk(logits_TE, k, bias_E=bias_E, **options)


def train(stage: int, mine: list[int]) -> dict[str, Any]:
    """Steps over the batches of this process, `mine`."""
    model = lively_model(tiny_config(moe=True, num_hidden_layers=2))
    recipe = Recipe(zero_stage=stage, streams=1, micro_batches=len(mine), weight_decay=0.0)
    engine = DeepSpeedEngine(TrainedModel(model), recipe)
    found: dict[str, Any] = {"losses": [], "dead": []}
    for step in range(STEPS):
        total = torch.zeros(())
        for number in mine:
            batch, labels = batch_of(number, step)
            with patch.object(sail_ops, "route_topk", own_half(number)):
                out = engine.forward(batch, pixels(1, seed=number))
                loss = out.answer_loss_sum / labels
                engine.backward(loss)
            engine.step(1e-2)
            total += loss.detach()
            found["dead"].append((out.counts_ME == 0).sum(1).tolist())
        dist.all_reduce(total)
        found["losses"].append(total.item() / BATCHES)
    return found | {"weights": model.state_dict()}


def main() -> None:
    """The first rank writes what came out; the weights are every rank's."""
    start_processes()
    rank, world = dist.get_rank(), dist.get_world_size()
    found = train(int(sys.argv[2]), [rank] if world > 1 else list(range(BATCHES)))
    if rank == 0:
        torch.save(found, sys.argv[1])
    dist.barrier()
    stop_processes()


if __name__ == "__main__":
    main()
