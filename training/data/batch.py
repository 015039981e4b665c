"""Rows of samples as tensors: positions restart at each sample, and no sample sees another.

A sample's branches all see its own tokens and themselves, never each other, and their positions go on from the end of
its own tokens: the logits of a branch are those of the same question asked alone, but the picture is paid for once.
Source: SAIL-VL2 report, section 5.1 (stream packing); the branches are ours.

B rows, L tokens of the longest of them, N tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sail_model.attention import Pack, pack_of, pack_of_columns
from training.data.sample import IGNORE, Branch, Ids, Sample

PADDING = 0


@dataclass
class Row:
    """One row, laid out: arrays [tokens], `pixels` [tiles, 3, size, size]. A run is (tokens, sample, branch)."""

    ids: Ids
    positions: Ids
    labels: Ids
    runs: list[tuple[int, int, int]]  # samples count from 1; branch 0 is a sample's own tokens
    pixels: Tensor

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Batch:
    """A micro-batch of one rank. `sample_BL` is 0 at padding, `branch_BL` is 0 in a sample's own tokens."""

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    labels_BL: Tensor  # aligned with the ids: position i is predicted from i - 1
    sample_BL: Tensor
    branch_BL: Tensor
    pixels: Tensor  # [N, 3, size, size], the tiles of all pictures in the order of their image tokens
    attention: Pack
    labels: int  # positions that are learned
    tokens: int  # without padding
    pairs: int  # (query, key) pairs that attention computes

    def token_mask(self) -> Tensor:
        """True where a token is no padding; bool [B, L]."""
        return self.sample_BL != PADDING

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """On `device`, pixels in `dtype`; ids and masks keep their types."""
        moved: dict[str, Any] = {
            entry.name: value.to(device, non_blocking=True)
            for entry in fields(self)
            if isinstance(value := getattr(self, entry.name), Tensor)
        }
        moved["pixels"] = moved["pixels"].to(dtype)
        return replace(self, **moved, attention=_moved(self.attention, device))


def _moved(pack: Pack, device: torch.device) -> Pack:
    keys = pack.keys
    if keys is not None:
        keys = keys._replace(**{name: getattr(keys, name).to(device) for name in ("rows", "columns", "cu_seqlens")})
    return pack._replace(cu_seqlens=pack.cu_seqlens.to(device), keys=keys)


def lay_out(samples: Sequence[Sample], pixels: Tensor, silenced: Sequence[int] = ()) -> Row:
    """The samples one behind the other; of those `silenced`, by their number from 0, nothing is learned."""
    ids, positions, labels, runs = [], [], [], []
    for number, sample in enumerate(samples):
        start = len(sample.ids)
        parts: list[Sample | Branch] = [sample, *sample.branches]
        for branch, part in enumerate(parts):
            count = len(part.ids)
            if count:
                ids.append(part.ids)
                labels.append(np.full_like(part.labels, IGNORE) if number in silenced else part.labels)
                positions.append(np.arange(count, dtype=np.int32) + (start if branch else 0))
                runs.append((count, number + 1, branch))
    return Row(np.concatenate(ids), np.concatenate(positions), np.concatenate(labels), runs, pixels)


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Rows as one batch; shorter ones are padded to the longest."""
    width = max(len(row) for row in rows)
    padded = [[*row.runs, (width - len(row), PADDING, 0)] if len(row) < width else row.runs for row in rows]
    sample_BL, branch_BL = (_spread(padded, place) for place in (1, 2))
    labels_BL = _stack([row.labels for row in rows], width, IGNORE)
    attention = attention_of(padded)
    return Batch(
        input_ids_BL=_stack([row.ids for row in rows], width, pad_id),
        position_ids_BL=_stack([row.positions for row in rows], width, 0),
        labels_BL=labels_BL,
        sample_BL=sample_BL,
        branch_BL=branch_BL,
        pixels=torch.cat([row.pixels for row in rows]),
        attention=attention,
        labels=int((labels_BL[:, 1:] != IGNORE).sum()),
        tokens=sum(len(row) for row in rows),
        pairs=attention.pairs(),
    )


def _stack(arrays: Sequence[Ids], width: int, fill: int) -> Tensor:
    out = np.full((len(arrays), width), fill, dtype=np.int64)
    for line, values in zip(out, arrays, strict=True):
        line[: len(values)] = values
    return torch.from_numpy(out)


def _spread(rows: Sequence[Sequence[tuple[int, int, int]]], place: int) -> Tensor:
    spread = [np.repeat([run[place] for run in runs], [run[0] for run in runs]) for runs in rows]
    return torch.from_numpy(np.stack(spread))


def attention_of(rows: Sequence[Sequence[tuple[int, int, int]]]) -> Pack:
    """Who sees whom, as sequences: each sample's own tokens, each branch on these and itself, and the padding."""
    if not any(branch for runs in rows for _, _, branch in runs):
        lengths = torch.tensor([0, *(count for runs in rows for count, _, _ in runs)])
        return pack_of(lengths.cumsum(0))
    queries, row_of, spans = [], [], []  # spans: (start, length), two for each sequence
    for row, runs in enumerate(rows):
        start, own, owner = 0, (0, 0), PADDING
        for count, sample, branch in runs:
            spans += [own if branch and owner == sample else (0, 0), (start, count)]
            if branch == 0:
                own, owner = (start, count), sample
            queries.append(count)
            row_of.append(row)
            start += count
    starts_2S, lengths_2S = np.array(spans).T
    keys_S = lengths_2S.reshape(-1, 2).sum(1)
    first_2S = lengths_2S.cumsum() - lengths_2S
    columns = np.arange(lengths_2S.sum()) + np.repeat(starts_2S - first_2S, lengths_2S)
    numbers = (torch.from_numpy(np.array(values)) for values in (queries, row_of, keys_S, columns))
    return pack_of_columns(*numbers)
