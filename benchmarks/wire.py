"""Bytes on the wire of a training step: ZeRO-2 with offload beside ZeRO-3, counted by the kernel.

Two processes train the demo's model in bfloat16 over gloo, alone in a network namespace of their own; counted is what
its loopback interface received, headers and acknowledgements too, divided by the steps. psi is the bytes of all weights
in bfloat16. Between two processes an all-reduce of psi moves 2 psi in all, a gather 1 psi; gloo's reduction to one
owner moves 1.5 psi and its reduce-scatter 2, where a ring moves 1. So with g micro-batches ZeRO-2 moves (2g + 1) psi
by all-reduce and (1.5g + 1) psi by reduction to a gradient's owner, ZeRO-3 4g psi once weights are let go after use;
on a ring (2g + 1), (g + 1) and 3g.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from torch.multiprocessing.spawn import start_processes

from benchmarks.loopback import ALONE, received
from training import parallel
from training.assemble import Parts, assemble, open_loader, open_samples
from training.catalog import DEMO
from training.engines import deepspeed
from training.objectives.supervised import Supervised
from training.recipes import Recipe

ROOT = Path(__file__).resolve().parent.parent
PROCESSES, LR = 2, 1e-9
STEPS = {"full": 2, "tiny": 1}
MICRO_BATCHES = {"full": (1, 4), "tiny": (1,)}
# the port is free: the namespace is new
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", "GLOO_SOCKET_IFNAME": "lo"}
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **ADDRESS}


class Setting(NamedTuple):
    """A way to train, and DeepSpeed's options for it beside the recipe's."""

    name: str
    zero_stage: int
    options: dict[str, Any]


# what a model that does not fit does; by default one this small stays whole, and every weight of up to 100,000 elements
LET_GO = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0}
SETTINGS = (
    Setting("ZeRO-2, offload", 2, {}),
    Setting("ZeRO-2, offload, reduced to owners", 2, {"use_multi_rank_bucket_allreduce": False}),
    Setting("ZeRO-3, weights let go after use", 3, LET_GO),
    Setting("ZeRO-3, defaults: weights that fit are kept", 3, {}),
)


def count(size: str) -> dict[str, Any]:
    """{"psi": bytes, "wire": {setting: {micro-batches: bytes a step}}}, of two processes started for it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counted.json"
        command = [*ALONE, sys.executable, "-m", "benchmarks.wire", size, str(out)]
        ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, cwd=ROOT)
        if ran.returncode:
            raise RuntimeError(f"benchmarks.wire ended with {ran.returncode}:\n{ran.stderr}")
        return json.loads(out.read_text())


@contextmanager
def with_options(options: dict[str, Any]) -> Iterator[None]:
    """Engines made inside have these of DeepSpeed's `zero_optimization` too."""
    made = deepspeed.deepspeed_config

    def changed(recipe: Recipe, world: int) -> dict[str, Any]:
        config = made(recipe, world)
        config["zero_optimization"] |= options
        return config

    with patch.object(deepspeed, "deepspeed_config", changed):
        yield


def bytes_a_step(parts: Parts, recipe: Recipe, options: dict[str, Any], steps: int) -> float:
    """Of both processes, after a first step, whose order of gradients and of weights DeepSpeed records."""
    with with_options(options):
        engine = deepspeed.DeepSpeedEngine(Supervised(copy.deepcopy(parts.model).bfloat16().train()), recipe)
    samples = open_samples(recipe, parts.processor)
    loader = open_loader(samples, recipe, parts.pad_id, rank=parallel.rank(), world=parallel.world())
    counted = []
    for step in range(steps + 1):
        batches = loader.next().batches
        if step <= 1:
            parallel.barrier()
            counted.append(received())
            parallel.barrier()  # nothing is sent between the two readings of a moment
        engine.train_step(batches, LR)
    parallel.barrier()
    total = received() - counted[-1]
    parallel.barrier()
    engine.close()
    return total / steps


def count_settings(rank: int, parts: Parts, recipe: Recipe, size: str, out: Path) -> None:
    """In each process: count every setting, write the first one's figures."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES))
    parallel.start_processes("cpu")
    wire: dict[str, dict[int, float]] = {}
    for setting in SETTINGS:
        for number in MICRO_BATCHES[size]:
            one = replace(recipe, zero_stage=setting.zero_stage, micro_batches=number, streams=PROCESSES * number)
            wire.setdefault(setting.name, {})[number] = bytes_a_step(parts, one, setting.options, STEPS[size])
    if parallel.is_first():
        psi = sum(2 * parameter.numel() for parameter in parts.model.parameters())
        out.write_text(json.dumps({"psi": psi, "wire": wire}))
    parallel.stop_processes()


def main(arguments: list[str] | None = None) -> None:
    """What every process needs, once; then the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=STEPS)
    parser.add_argument("out", type=Path)
    chosen = parser.parse_args(arguments)
    import_module("deepspeed")  # once
    recipe = replace(DEMO[-1], data="easy_vqa:test", test="", workers=0, dtype="bfloat16", stream_length=320)
    given = (assemble(recipe), recipe, chosen.size, chosen.out)
    start_processes(count_settings, given, nprocs=PROCESSES, start_method="fork")


if __name__ == "__main__":
    main()
