"""Weights and optimizer state by parameter name, each rank its own fragments, as safetensors.

ZeRO gives a rank a fragment of each parameter's fp32 master weight and moments: elements [start, start + n) of it,
flattened. A rank writes those, with `start` in the file's header; to load, it reads from all files what its own
fragments cover. So a checkpoint needs no communication and no pickle, and fits any number of ranks under any stage.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from training import parallel

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
RANDOM = "random state"  # of the generator of each kind of device


class Fragment:
    """Elements from `start` on of parameter `name`: views of what the engine trains with, by kind of value."""

    def __init__(self, name: str, start: int, values: dict[str, Tensor]) -> None:
        self.name, self.start, self.values = name, start, values


class Stored:
    """The fragments that `world` ranks wrote. Raises OSError where a file is missing or damaged."""

    def __init__(self, folder: Path, world: int) -> None:
        self._files: list[Any] = []
        self._where: dict[str, list[tuple[int, int, int]]] = {}  # key: (start, stop, file)
        for rank in range(world):
            path = folder / file_name(rank, world)
            try:
                file = safe_open(path, framework="pt")
                starts = json.loads(file.metadata()["starts"])
            except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
                raise OSError(f"{path.name}: {error}") from error
            self._files.append(file)
            for key, start in starts.items():
                size = file.get_slice(key).get_shape()[0]
                self._where.setdefault(key, []).append((start, start + size, rank))

    def check(self, named: Mapping[str, nn.Parameter], moments: bool) -> None:
        """Raises ValueError unless each element of these parameters, and of no others, is stored once."""
        wanted = {
            f"{kind}/{name}": getattr(parameter, "ds_numel", parameter.numel())
            for name, parameter in named.items()
            for kind in (WEIGHT, *(MOMENTS if moments and parameter.requires_grad else ()))
        }
        for key in sorted(wanted.keys() | self._where.keys()):
            end = 0
            for first, last, _ in sorted(self._where.get(key, [])):
                end = last if first == end else -1
            if end != wanted.get(key):
                raise ValueError(f"{key}: {wanted.get(key, 'none')} elements wanted, stored are {self._spans(key)}")

    def _spans(self, key: str) -> str:
        return ", ".join(f"[{first}, {last})" for first, last, _ in sorted(self._where.get(key, []))) or "none"

    def read(self, kind: str, name: str, start: int, size: int) -> Tensor:
        """Elements [start, start + size). Raises ValueError where they are not all there."""
        key, out, filled = f"{kind}/{name}", torch.empty(size), 0
        for first, last, number in self._where.get(key, []):
            low, high = max(first, start), min(last, start + size)
            if low < high:
                out[low - start : high - start] = self._files[number].get_slice(key)[low - first : high - first]
                filled += high - low
        if filled != size:
            raise ValueError(f"{key}: {filled} of {size} elements from {start} on are stored")
        return out

    def restore_random_state(self, rank: int) -> None:
        """Of the rank that wrote as this one; one beyond those that wrote keeps its own."""
        if rank < len(self._files):
            file = self._files[rank]
            keys = [key for key in file.keys() if key.startswith(f"{RANDOM}/")]  # noqa: SIM118 (no mapping)
            parallel.restore_random_states({key.removeprefix(f"{RANDOM}/"): file.get_tensor(key) for key in keys})


class Fragments(ABC):
    """What an engine's rank holds."""

    @abstractmethod
    def __iter__(self) -> Iterator[Fragment]: ...

    @abstractmethod
    def load(self, stored: Stored, steps: int) -> None:
        """Copy what is stored into them, and into the weights that the model computes with."""


def file_name(rank: int, world: int) -> str:
    """Of the fragments of one rank."""
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def write(folder: Path, fragments: Fragments, rank: int, world: int) -> None:
    """This rank's file. Raises OSError where it cannot be written."""
    tensors, starts = {f"{RANDOM}/{kind}": state for kind, state in parallel.random_states().items()}, {}
    for fragment in fragments:
        for kind, values in fragment.values.items():
            key = f"{kind}/{fragment.name}"
            tensors[key] = values.detach().to(parallel.HOST, torch.float32, copy=True).contiguous()
            starts[key] = fragment.start
    try:
        save_file(tensors, folder / file_name(rank, world), metadata={"starts": json.dumps(starts)})
    except SafetensorError as error:  # no OSError, though what fails is the disk
        raise OSError(f"{file_name(rank, world)}: {error}") from error


def of(engine: Any, model: nn.Module, stage: int) -> Fragments:
    """The fragments of a DeepSpeed engine around `model`."""
    kind: Any = {0: _Whole, 1: _Partitioned, 2: _Partitioned, 3: _Sharded}[stage]
    found: Fragments = kind(engine, dict(model.named_parameters()))
    return found


class _Base(Fragments, ABC):
    """Those of a DeepSpeed engine."""

    def __init__(self, engine: Any, named: dict[str, nn.Parameter]) -> None:
        self.engine, self.optimizer, self.named = engine, engine.optimizer, named

    def frozen(self) -> Iterator[Fragment]:
        """Parameters outside the optimizer, whole, from the first rank alone."""
        if self.engine.global_rank == 0:
            for name, parameter in self.named.items():
                if not parameter.requires_grad:
                    yield Fragment(name, 0, {WEIGHT: self.whole(parameter)})

    def whole(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().flatten()


class _Whole(_Base):
    """No ZeRO: every rank has all; the first one writes."""

    def __iter__(self) -> Iterator[Fragment]:
        yield from self.frozen()
        if self.engine.global_rank == 0:
            for name, parameter in self.named.items():
                if parameter.requires_grad:
                    yield Fragment(name, 0, self._values(parameter))

    def _values(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.optimizer.state.get(parameter, {})
        return {WEIGHT: parameter.detach().flatten(), **{key: state[key].flatten() for key in MOMENTS if key in state}}

    def load(self, stored: Stored, steps: int) -> None:
        for name, parameter in self.named.items():
            _fill(parameter.data, stored, WEIGHT, name)
            if parameter.requires_grad and steps:
                state = make_state(self.optimizer, parameter, steps)
                for key in MOMENTS:
                    _fill(state[key], stored, key, name)


class _Partitioned(_Base):
    """ZeRO 1 and 2: every rank has all weights, and of masters and moments a flat partition of each group."""

    def __iter__(self) -> Iterator[Fragment]:
        yield from self.frozen()
        names = {id(parameter): name for name, parameter in self.named.items()}
        for group, flat in zip(
            self.optimizer.bit16_groups, self.optimizer.single_partition_of_fp32_groups, strict=True
        ):
            state = self.optimizer.optimizer.state.get(flat, {})
            for parameter in group:
                if (mapping := parameter._hp_mapping) is None:
                    continue  # this rank's partition has nothing of it
                place, start = mapping.get_hp_fragment_address(), mapping.lp_fragment_address.start
                parts = {WEIGHT: flat, **{key: state[key] for key in MOMENTS if key in state}}
                values = {key: values.data.narrow(0, place.start, place.numel) for key, values in parts.items()}
                yield Fragment(names[id(parameter)], start, values)

    def load(self, stored: Stored, steps: int) -> None:
        for name, parameter in self.named.items():
            _fill(parameter.data, stored, WEIGHT, name)
        if steps:
            for flat in self.optimizer.single_partition_of_fp32_groups:
                make_state(self.optimizer.optimizer, flat, steps)
        for fragment in self:
            if self.named[fragment.name].requires_grad:
                for key, values in fragment.values.items():
                    values.copy_(stored.read(key, fragment.name, fragment.start, values.numel()))


class _Sharded(_Base):
    """ZeRO 3: every rank has a part of every parameter; each is padded to a multiple of the ranks."""

    def __iter__(self) -> Iterator[Fragment]:
        yield from self.frozen()
        for name, parameter in self.named.items():
            if parameter.requires_grad:
                start, size = self._range(parameter)
                if size:
                    values = {key: values[:size] for key, values in self._values(parameter).items()}
                    yield Fragment(name, start, values)

    def _range(self, parameter: Any) -> tuple[int, int]:
        """Start and number of this rank's elements, without padding."""
        width = parameter.ds_tensor.ds_numel
        start = width * self.optimizer._get_param_partition_rank(parameter)
        return start, max(0, min(width, parameter.ds_numel - start))

    def _values(self, parameter: Any) -> dict[str, Tensor]:
        def read(key: str | None) -> Tensor:
            part: Tensor
            part, _ = self.optimizer._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=False, optim_state_key=key
            )
            return part

        found = {WEIGHT: read(None)}
        group, *_ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        state = self.optimizer.optimizer.state.get(self.optimizer.fp32_partitioned_groups_flat[group], {})
        return found | {key: read(key) for key in MOMENTS if key in state}

    def whole(self, parameter: Any) -> Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().flatten().clone()

    def frozen(self) -> Iterator[Fragment]:
        """Gathering takes all ranks."""
        for name, parameter in self.named.items():
            if not parameter.requires_grad:
                found = self.whole(parameter)
                if self.engine.global_rank == 0:
                    yield Fragment(name, 0, {WEIGHT: found})

    def load(self, stored: Stored, steps: int) -> None:
        self.optimizer.checkpoint_event_prologue()  # small parameters stay gathered between steps: let go of them
        if steps:
            for flat in self.optimizer.fp32_partitioned_groups_flat:
                make_state(self.optimizer.optimizer, flat, steps)
        self._copy(stored)
        self.optimizer.checkpoint_event_epilogue()

    def _copy(self, stored: Stored) -> None:
        for name, parameter in self.named.items():
            start, size = self._range(parameter)
            if size:
                weights = stored.read(WEIGHT, name, start, size)
                parameter.ds_tensor.data[:size].copy_(weights)  # type: ignore[attr-defined]
                if not parameter.requires_grad:
                    continue
                for key, values in self._values(parameter).items():
                    values[:size].copy_(stored.read(key, name, start, size))


def _fill(target: Tensor, stored: Stored, kind: str, name: str) -> None:
    target.copy_(stored.read(kind, name, 0, target.numel()).view_as(target))


def make_state(optimizer: torch.optim.Optimizer, parameter: Tensor, steps: int) -> dict[str, Any]:
    """Adam's state of `parameter` as its first step would make it, `steps` steps later.

    torch's AdamW counts steps in a tensor, DeepSpeed's CPU Adam in an int that it hands to compiled code.
    """
    state: dict[str, Any] = optimizer.state[parameter]
    for key in MOMENTS:
        if key not in state:
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    state["step"] = torch.tensor(float(steps)) if isinstance(optimizer, torch.optim.AdamW) else steps
    return state
