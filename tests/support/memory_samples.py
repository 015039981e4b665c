"""Samples made from their numbers, for tests of streams: no file, picklable, the same in every process."""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sail_model.images import CorruptImageError
from training.data.conversation import BadRecord
from training.data.order import mix
from training.data.sample import IGNORE, Branch, PictureSlot, Sample

TILE_TOKENS = 4


@dataclass
class MemorySamples:
    """Record r of source s has 0 to 2 pictures and a length of its own; `bad`, `corrupt` and `killer` are records."""

    lengths: Sequence[int] = (40, 24)
    weights: Sequence[float] = (0.75, 0.25)
    bad: tuple[tuple[int, int], ...] = ()
    corrupt: tuple[tuple[int, int], ...] = ()
    killer: tuple[int, int] | None = None
    tile_shape: tuple[int, int, int] = (3, 2, 2)

    def sample(self, source: int, record: int) -> list[Sample]:
        where = f"{source}: line {record}"
        if (source, record) in self.bad:
            raise BadRecord(where, "is bad")
        if (source, record) == self.killer:
            os.kill(os.getpid(), signal.SIGKILL)
        bits = mix(source, record)
        tiles = [1 + (bits >> shift & 1) for shift in range(bits % 3)]
        name = Path(f"{source}-{record}")
        pictures = tuple(PictureSlot(name, n, n * TILE_TOKENS, n * TILE_TOKENS) for n in tiles)
        ids = np.full(sum(tiles) * TILE_TOKENS + 3 + bits % 11, 1000 * source + record, dtype=np.int32)
        branches = tuple(Branch(ids[:3], labeled(ids[:3])) for _ in range(bits >> 8 & 1))
        return [Sample(ids, labeled(ids), branches, pictures, where) for _ in range(1 + (bits >> 9 & 1))]

    def pixels(self, picture: PictureSlot) -> Tensor:
        source, record = map(int, str(picture.source).split("-"))
        if (source, record) in self.corrupt:
            raise CorruptImageError("no picture")
        return torch.full((picture.tiles, *self.tile_shape), 1.0 + record)


def labeled(ids: np.ndarray) -> np.ndarray:
    """`ids` as labels of all but the first."""
    labels = ids.copy()
    labels[0] = IGNORE
    return labels
