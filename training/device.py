"""Where training runs: the process group and the threads."""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

# a rank that died leaves the others waiting; they give up after this long
TIMEOUT = timedelta(minutes=10)


def start_processes() -> None:
    """Join the gloo group that torchrun (or a like launcher) describes; without one, be the only process."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if dist.is_initialized():
        return
    if "WORLD_SIZE" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(alone)
    dist.init_process_group("gloo", timeout=TIMEOUT)


def stop_processes() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process reports and writes."""
    return dist.get_rank() == 0


def sum_over_ranks(values: list[float]) -> list[float]:
    """Sums over all ranks, in float64, one collective for the whole list."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()
