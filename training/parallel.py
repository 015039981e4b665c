"""Devices, backends and groups of processes: the only file of `training` that names them."""

import os
import socket
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from training.errors import InputError
from training.interrupt import launcher_ended

HOST = torch.device("cpu")  # where checkpoints, exports and offloaded state are
# a rank that died leaves the others waiting; they give up after this many seconds
TIMEOUT_VARIABLE, TIMEOUT = "SAIL_TRAINING_TIMEOUT", 600.0


class Kind(NamedTuple):
    """A kind of device: its backend of collectives, and what DeepSpeed calls it."""

    name: str
    backend: str


KINDS = {kind.name: kind for kind in (Kind("cuda", "nccl"), Kind("npu", "hccl"), Kind("cpu", "gloo"))}
DEVICE_FILES = {"cuda": "nvidia[0-9]*", "npu": "davinci[0-9]*"}  # in DEV, of a driver that is loaded
DEV = Path("/dev")
_chosen: Kind | None = None
_reported = False


def choose(name: str | None = None) -> Kind:
    """The kind called `name`, or the first that is there of cuda, npu, cpu. Raises InputError where `name` is not."""
    if name is None:
        return next(kind for kind in KINDS.values() if _missing(kind.name) is None)
    if name not in KINDS:
        raise InputError(f"--device: got {name!r}, want one of {', '.join(KINDS)}")
    if (reason := _missing(name)) is not None:
        raise InputError(f"--device: {name} cannot be used here: {reason}")
    return KINDS[name]


def _missing(name: str) -> str | None:
    """Why devices of this kind cannot be used, or None."""
    if name == "cuda":
        if torch.version.cuda is None:
            return "this torch is built without CUDA"
        return _cuda_error()
    if name == "npu":
        try:
            import torch_npu  # registers the device "npu"; needs CANN
        except (ImportError, OSError) as error:
            return f"torch_npu does not import: {error}"
        return None if torch_npu.npu.is_available() else "torch_npu finds no device"
    return None


def _cuda_error() -> str | None:
    """What torch says of a driver that is missing or too old, or of hidden devices; None where there is one."""
    with warnings.catch_warnings(action="ignore"):  # it is said once, by us
        if torch.cuda.is_available():
            return None
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())
            hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
            return reason if hidden is None else f"{reason} (CUDA_VISIBLE_DEVICES={hidden})"
    return "torch finds no CUDA device or driver"


def passed_over(chosen: Kind) -> list[str]:
    """A sentence for each kind that comes before `chosen`, has device files on this machine and cannot be used."""
    before = list(KINDS)[: list(KINDS).index(chosen.name)]
    found = {name: min(DEV.glob(DEVICE_FILES[name]), default=None) for name in before}
    return [
        f"{path} is there, but {name} cannot be used: {_missing(name)}; training on {chosen.name}"
        for name, path in found.items()
        if path is not None
    ]


def start_processes(device: str | None = None) -> None:
    """Take the device of this process and join the group that torchrun describes; without one, be the only process.

    Raises InputError where the device asked for is not there, or there are fewer than processes on this machine.
    """
    global _chosen
    if dist.is_initialized():
        return
    kind = choose(device)
    if device is None and os.environ.get("RANK", "0") == "0":
        for reason in passed_over(kind):
            print(f"warning: {reason}", file=sys.stderr)
    os.environ["DS_ACCELERATOR"] = kind.name
    if "WORLD_SIZE" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))
    _chosen = kind
    if kind.name != "cpu":
        devices: Any = getattr(torch, kind.name)
        local = int(os.environ["LOCAL_RANK"])
        if local >= devices.device_count():
            raise InputError(f"process {local} of this machine has no {kind.name}: it has {devices.device_count()}")
        devices.set_device(local)
    seconds = float(os.environ.get(TIMEOUT_VARIABLE, TIMEOUT))
    with _ending_with_launcher():
        dist.init_process_group(kind.backend, timeout=timedelta(seconds=seconds))


@contextmanager
def _ending_with_launcher() -> Iterator[None]:
    """A process that waits for the others would try on for minutes after torchrun, by which they join, is gone."""
    joined = threading.Event()

    def watch() -> None:
        while not joined.wait(0.5):
            if launcher_ended():
                print("error: torchrun ended before all processes had joined", file=sys.stderr, flush=True)
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop_processes() -> None:
    """Leave the group."""
    global _chosen, _reported
    _chosen, _reported = None, False
    if not dist.is_initialized():
        return
    if (deepspeed := sys.modules.get("deepspeed")) is not None and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()  # and the groups that it keeps, which would outlive torch's
    else:
        dist.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Whether a collective failed because another process has ended, or has not answered within the time-out."""
    # gloo raises a plain RuntimeError, whose text begins with a file of its own
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def reports_first() -> bool:
    """Whether no process of this run has said yet why it ends: what others say after that are only consequences."""
    global _reported
    if _reported:
        return False
    _reported = True
    if not dist.is_initialized():
        return os.environ.get("RANK", "0") == "0"  # nothing was done that could fail on one process alone
    try:
        return dist.distributed_c10d._get_default_store().add("reported", 1) == 1
    except RuntimeError:  # the store has ended with its process
        return True


def kind() -> Kind:
    """What this process computes on."""
    return _chosen or choose()


def device() -> torch.device:
    """The device of this process."""
    name = kind().name
    return HOST if name == HOST.type else torch.device(name, int(os.environ["LOCAL_RANK"]))


def random_states() -> dict[str, Tensor]:
    """The states of this process's random generators, by kind of device: torch's own, and its accelerator's."""
    states = {HOST.type: torch.get_rng_state()}
    if (name := kind().name) != HOST.type:
        states[name] = getattr(torch, name).get_rng_state()
    return states


def restore_random_states(states: Mapping[str, Tensor]) -> None:
    """Go on from what `random_states` gave; a generator of a kind of device that is not in `states` stays as it is."""
    torch.set_rng_state(states[HOST.type])
    if (name := kind().name) != HOST.type and name in states:
        getattr(torch, name).set_rng_state(states[name])


def data_group() -> dist.ProcessGroup | None:
    """The ranks that each read a share of the data: those over which counts, labels and gradients are summed."""
    return dist.group.WORLD


def rank() -> int:
    """Of this process, among all."""
    return dist.get_rank()


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size()


def is_first() -> bool:
    """Whether this process reports and writes."""
    return dist.get_rank() == 0


def barrier() -> None:
    """Wait for all."""
    dist.barrier()


def sum_over_ranks(values: list[float]) -> list[float]:
    """Sums over all ranks that read data, in float64 (float32 on an NPU), one collective for the whole list."""
    wide = torch.float32 if kind().name == "npu" else torch.float64
    total = torch.tensor(values, dtype=wide, device=device())
    dist.all_reduce(total, group=data_group())
    return [float(value) for value in total.tolist()]


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, on every rank; what pickle takes, from the processes of this run alone."""
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found
