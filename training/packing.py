"""Packed streams: many samples in one row, positions restarting per sample, attention blocked between them.

A sample is a picture prefix followed by branches, one per question. Every branch sees the prefix and itself,
never another branch, and its positions go on from the end of the prefix: the logits of a branch are those of
the same question asked alone, but the picture is paid for once. Source: SAIL-VL2 report, section 5.1 (stream
packing); the branches are ours.

B streams, L tokens a stream.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sail_model.attention import Pack, pack_with_keys

IGNORE = -100
PADDING = 0

PictureT = TypeVar("PictureT")


@dataclass(frozen=True)
class Branch:
    """One question and its answer; `labels` is IGNORE where nothing is to be learned."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.labels):
            raise ValueError(f"Branch: labels: got {len(self.labels)} labels, want one per id: {len(self.ids)}")
        if self.labels[:1] != (IGNORE,):
            # the token before a branch belongs to another branch or to the prefix and must not predict it
            raise ValueError(f"Branch: labels: got {self.labels[:1]} at the first token, want {IGNORE}")


@dataclass(frozen=True)
class Sample(Generic[PictureT]):
    """A picture, the tokens that show it, and the branches that follow."""

    picture: PictureT
    prefix_ids: tuple[int, ...]
    branches: tuple[Branch, ...]

    def __post_init__(self) -> None:
        if not self.branches:
            # without tokens it would still bring its picture into a batch, and shift those of all others
            raise ValueError(f"Sample: branches: got none for {self.picture}, want at least one")

    def __len__(self) -> int:
        return len(self.prefix_ids) + sum(len(branch.ids) for branch in self.branches)


@dataclass
class PackedBatch(Generic[PictureT]):
    """Streams as tensors [B, L]; `sample_BL` is 0 at padding, `branch_BL` is 0 in a prefix.

    `owners[n]` is the (stream, sample) that shows `pictures[n]`.
    """

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    labels_BL: Tensor
    sample_BL: Tensor
    branch_BL: Tensor
    pictures: list[PictureT]
    owners: list[tuple[int, int]]

    @cached_property
    def attention(self) -> Pack:
        """Who sees whom, as sequences: each prefix, each branch on its prefix and itself, and the padding."""
        sequences = []
        for row, tokens in enumerate(zip(self.sample_BL.tolist(), self.branch_BL.tolist(), strict=True)):
            start, prefix = 0, (PADDING, torch.arange(0))
            for (sample, branch), run in groupby(zip(*tokens, strict=True)):
                own = torch.arange(start, start := start + len(list(run)))
                if branch == 0:
                    prefix = sample, own
                seen = prefix[1] if branch and prefix[0] == sample else own[:0]
                sequences.append((len(own), row, torch.cat([seen, own])))
        return pack_with_keys(sequences)

    def token_mask(self) -> Tensor:
        """True where a token is no padding; bool [B, L]."""
        return self.sample_BL != PADDING

    def silence(self, number: int) -> None:
        """Learn nothing from the sample that shows picture `number`: its labels become IGNORE."""
        stream, sample = self.owners[number]
        self.labels_BL[stream, self.sample_BL[stream] == sample] = IGNORE


def split_to_fit(sample: Sample[PictureT], capacity: int) -> list[Sample[PictureT]]:
    """Parts of `sample`, each with its own copy of the prefix and at most `capacity` tokens.

    Raises ValueError if the prefix and one branch do not fit: a sample is never truncated.
    """
    parts: list[Sample[PictureT]] = []
    chosen: list[Branch] = []
    room = capacity - len(sample.prefix_ids)
    for branch in sample.branches:
        need = len(sample.prefix_ids) + len(branch.ids)
        if need > capacity:
            raise ValueError(
                f"split_to_fit: sample: picture and one question need {need} tokens, a stream holds {capacity}"
            )
        if len(branch.ids) > room:
            parts.append(Sample(sample.picture, sample.prefix_ids, tuple(chosen)))
            chosen, room = [], capacity - len(sample.prefix_ids)
        chosen.append(branch)
        room -= len(branch.ids)
    return [*parts, Sample(sample.picture, sample.prefix_ids, tuple(chosen))]


def plan_streams(lengths: Sequence[int], order: Iterable[int], capacity: int, buffer_size: int = 64) -> list[list[int]]:
    """Sample numbers of each stream: at most `capacity` tokens, filled from a buffer of the next candidates.

    The oldest candidate opens a stream, so no sample waits for ever, however badly it fits; then the longest
    that still fits is taken until none does. Every sample of `order` appears exactly once.
    """
    if buffer_size < 1:
        raise ValueError(f"plan_streams: buffer_size: got {buffer_size}, want at least 1")
    waiting = iter(order)
    streams: list[list[int]] = []
    buffer: list[int] = []
    while True:
        for number in waiting:
            if lengths[number] > capacity:
                raise ValueError(
                    f"plan_streams: sample {number} has {lengths[number]} tokens, a stream holds {capacity}"
                )
            buffer.append(number)
            if len(buffer) == buffer_size:
                break
        if not buffer:
            return streams
        streams.append(_fill_one(lengths, buffer, capacity))


def _fill_one(lengths: Sequence[int], buffer: list[int], capacity: int) -> list[int]:
    stream = [buffer.pop(0)]
    room = capacity - lengths[stream[0]]
    while fitting := [number for number in buffer if lengths[number] <= room]:
        longest = max(fitting, key=lambda number: lengths[number])
        buffer.remove(longest)
        stream.append(longest)
        room -= lengths[longest]
    return stream


def pack(streams: Sequence[Sequence[Sample[PictureT]]], pad_id: int) -> PackedBatch[PictureT]:
    """Lay the samples of each stream one behind the other; shorter streams are padded to the longest."""
    width = max(sum(len(sample) for sample in stream) for stream in streams)
    rows = [_lay_out(stream, width, pad_id) for stream in streams]
    ids, positions, labels, samples, branches = (torch.tensor(column) for column in zip(*rows, strict=True))
    pictures = [sample.picture for stream in streams for sample in stream]
    owners = [(row, number) for row, stream in enumerate(streams) for number in range(1, len(stream) + 1)]
    return PackedBatch(ids, positions, labels, samples, branches, pictures, owners)


def _lay_out(stream: Sequence[Sample[PictureT]], width: int, pad_id: int) -> tuple[list[int], ...]:
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    samples: list[int] = []
    branches: list[int] = []

    def append(new_ids: Sequence[int], first: int, new_labels: Sequence[int], sample: int, branch: int) -> None:
        ids.extend(new_ids)
        positions.extend(range(first, first + len(new_ids)))
        labels.extend(new_labels)
        samples.extend([sample] * len(new_ids))
        branches.extend([branch] * len(new_ids))

    for s, sample in enumerate(stream, start=1):
        start = len(sample.prefix_ids)
        append(sample.prefix_ids, 0, [IGNORE] * start, s, 0)
        for b, branch in enumerate(sample.branches, start=1):
            append(branch.ids, start, branch.labels, s, b)
    padding = width - len(ids)
    append([pad_id] * padding, 0, [IGNORE] * padding, PADDING, 0)
    return ids, positions, labels, samples, branches
