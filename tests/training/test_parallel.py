"""The device, its backend and its groups: chosen in one file, and named nowhere else in `training`."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import engine_worker as worker
import pytest
import torch
import torch.distributed as dist

from training import parallel
from training.engines import fragments
from training.errors import InputError

TRAINING = Path(parallel.__file__).parent


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # as where it is not installed


def card(monkeypatch: pytest.MonkeyPatch, count: int = 1) -> list[int]:
    """CUDA devices, and the list of those that are set."""
    taken: list[int] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


def npu(monkeypatch: pytest.MonkeyPatch, available: bool = True) -> None:
    module: Any = ModuleType("torch_npu")
    module.npu = SimpleNamespace(is_available=lambda: available)
    monkeypatch.setitem(sys.modules, "torch_npu", module)


@pytest.mark.usefixtures("no_card")
def test_a_machine_without_a_card_computes_on_its_cpu() -> None:
    assert parallel.choose() == ("cpu", "gloo") == parallel.choose("cpu")


@pytest.mark.usefixtures("no_card")
def test_a_card_is_taken_before_an_npu_and_that_before_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    npu(monkeypatch)
    assert parallel.choose() == ("npu", "hccl")
    card(monkeypatch)
    assert parallel.choose() == ("cuda", "nccl")
    assert parallel.choose("npu").backend == "hccl" and parallel.choose("cpu").backend == "gloo"


@pytest.mark.usefixtures("no_card")
def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    errors = {
        "tpu": "--device: got 'tpu', want one of cuda, npu, cpu",
        "cuda": "--device: cuda cannot be used here: this torch is built without CUDA",
        "npu": "--device: npu cannot be used here: torch_npu does not import",
    }
    for name, message in errors.items():
        with pytest.raises(InputError, match=message):
            parallel.choose(name)
    old_driver(monkeypatch)
    with pytest.raises(InputError, match="--device: cuda cannot be used here: The NVIDIA driver .* is too old"):
        parallel.choose("cuda")
    npu(monkeypatch, available=False)
    with pytest.raises(InputError, match="torch_npu finds no device"):
        parallel.choose("npu")


def old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040).")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Arguments of `init_process_group`, which does nothing."""
    calls: list[Any] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: calls.append((backend, timeout)))
    monkeypatch.setattr(parallel, "_chosen", None)
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "DS_ACCELERATOR": ""}.items():
        monkeypatch.setenv(name, value)
    yield calls


def test_a_process_takes_the_device_of_its_number(monkeypatch: pytest.MonkeyPatch, started: list[Any]) -> None:
    taken = card(monkeypatch, count=2)
    monkeypatch.setenv(parallel.TIMEOUT_VARIABLE, "45")
    parallel.start_processes()
    [(backend, timeout)] = started
    assert (backend, timeout.total_seconds(), taken) == ("nccl", 45.0, [1])
    assert parallel.kind().name == "cuda" and parallel.device() == torch.device("cuda", 1)
    assert parallel.os.environ["DS_ACCELERATOR"] == "cuda"


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch, started: list[Any]) -> None:
    card(monkeypatch, count=1)
    with pytest.raises(InputError, match="process 1 of this machine has no cuda: it has 1"):
        parallel.start_processes()
    assert not started


@pytest.mark.usefixtures("no_card")
def test_without_torchrun_a_process_is_the_only_one(monkeypatch: pytest.MonkeyPatch, started: list[Any]) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "none of this run's")
    monkeypatch.delenv("WORLD_SIZE")
    parallel.start_processes()
    assert started[0][0] == "gloo" and parallel.device() == parallel.HOST
    assert [parallel.os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["0", "0", "1"]
    assert int(parallel.os.environ["MASTER_PORT"]) > 1023
    monkeypatch.delenv("WORLD_SIZE")


@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize("rank", ["0", "1"])
def test_devices_that_are_there_and_cannot_be_used_are_said_once(
    rank: str,
    monkeypatch: pytest.MonkeyPatch,
    started: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Else a run takes days on the CPU of a machine whose card only wants another driver."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(parallel, "DEV", tmp_path)
    old_driver(monkeypatch)
    parallel.start_processes()
    assert not capsys.readouterr().err  # no device, nothing to say
    for name in ("nvidia0", "nvidia1", "nvidiactl", "davinci3"):
        (tmp_path / name).touch()
    parallel.start_processes("cpu")
    assert not capsys.readouterr().err  # as asked
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    parallel.start_processes()
    said = capsys.readouterr().err.splitlines()
    if rank != "0":
        assert not said
        return
    assert said[0] == (
        f"warning: {tmp_path}/nvidia0 is there, but cuda cannot be used: The NVIDIA driver on your system is too old"
        " (found version 11040). (CUDA_VISIBLE_DEVICES=); training on cpu"
    )
    assert said[1].startswith(
        f"warning: {tmp_path}/davinci3 is there, but npu cannot be used: torch_npu does not import"
    )
    assert len(said) == 2
    card(monkeypatch, count=2)
    parallel.start_processes()
    assert not capsys.readouterr().err


def test_processes_that_stopped_can_start_again() -> None:
    """DeepSpeed kept groups of the first start, of which torch knew nothing in the second."""
    with patch.dict(os.environ):
        for _ in range(2):
            parallel.start_processes("cpu")
            worker.engine_of(worker.ALONE["alone-0"]).close()
            parallel.stop_processes()
        assert not dist.is_initialized()


@pytest.mark.parametrize(("name", "wide"), [("npu", torch.float32), ("cuda", torch.float64), ("cpu", torch.float64)])
def test_sums_are_as_wide_as_the_device_has_numbers(
    name: str, wide: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "_chosen", parallel.KINDS[name])
    monkeypatch.setattr(parallel, "device", lambda: parallel.HOST)  # of a tensor that is there

    def twice(total: torch.Tensor, group: Any) -> None:
        assert total.dtype == wide
        total.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", twice)
    assert parallel.sum_over_ranks([1.0, 2.5]) == [2.0, 5.0]


class Accelerator:
    """A device's generator, beside torch's own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)
        self.get_rng_state, self.set_rng_state = self.generator.get_state, self.generator.set_state

    def draw(self) -> float:
        return float(torch.rand(1, generator=self.generator))


class NoFragments(fragments.Fragments):
    def __iter__(self) -> Iterator[fragments.Fragment]:
        return iter(())

    def load(self, stored: fragments.Stored, steps: int) -> None: ...


@pytest.mark.parametrize("name", ["npu", "cpu"])
def test_a_checkpoint_holds_the_random_states_of_host_and_device(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Accelerator()
    monkeypatch.setattr(torch, "npu", device, raising=False)
    monkeypatch.setattr(parallel, "_chosen", parallel.KINDS[name])
    fragments.write(tmp_path, NoFragments(), 0, 1)
    wanted = (torch.rand(1), device.draw())
    fragments.Stored(tmp_path, 1).restore_random_state(0)
    host, on_device = torch.rand(1), device.draw()
    assert torch.equal(host, wanted[0]) and (on_device == wanted[1]) == (name == "npu")


def test_a_device_that_the_checkpoint_did_not_know_keeps_its_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    device, twin = Accelerator(), Accelerator()
    monkeypatch.setattr(torch, "npu", device, raising=False)
    monkeypatch.setattr(parallel, "_chosen", parallel.KINDS["npu"])
    parallel.restore_random_states({"cpu": torch.get_rng_state(), "cuda": torch.zeros(16, dtype=torch.uint8)})
    assert device.draw() == twin.draw()


NAMES = {"cpu", "npu", "gloo", "nccl", "hccl"}


def named(text: str) -> list[str]:
    """Devices, backends and the group of all that a file names: in strings that are no docstring, and in attributes."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [node.value] if node.value.split(":")[0] in NAMES else []
        elif isinstance(node, ast.Attribute) and node.attr in {"cpu", "npu", "WORLD"}:
            found.append(f".{node.attr}")
    return found


@pytest.mark.parametrize(
    "line", ['x.to("cpu")', "x.cpu()", 'torch.device("npu:0")', 'f(backend="gloo")', "dist.group.WORLD", 'f("nccl")']
)
def test_a_name_is_found(line: str) -> None:
    assert len(named(f'"""On the "cpu", by gloo."""\n{line}  # gloo')) == 1


def test_nothing_else_of_training_names_a_device_a_backend_or_the_group_of_all() -> None:
    files = [path for path in TRAINING.rglob("*.py") if path.name != "parallel.py"]
    assert len(files) > 30
    found = {path.relative_to(TRAINING): names for path in files if (names := named(path.read_text(encoding="utf-8")))}
    assert not found


def test_a_process_that_waits_for_the_others_ends_with_its_launcher() -> None:
    """Nobody listens at the port, and torch would try on for the ten minutes of its time-out, twice."""
    joins = "from training import parallel; print('joining', flush=True); parallel.start_processes('cpu')"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {joins!r}])"
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(parallel._free_port())}
    process = subprocess.Popen(
        [sys.executable, "-c", launcher], env=os.environ | torchrun, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"joining\n"
    process.kill()
    _, printed = process.communicate(timeout=120)  # until the last process that writes there has ended
    assert b"torchrun ended before all processes had joined" in printed
