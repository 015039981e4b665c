"""A record as tokens: what packing lays into streams. Pictures are counted, not decoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

IGNORE = -100
Ids = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Branch:
    """Tokens that follow the sample's own, unseen by other branches; `labels` is IGNORE where nothing is learned.

    Raises ValueError where the first token is labeled: the one before it may belong to another branch.
    """

    ids: Ids
    labels: Ids

    def __post_init__(self) -> None:
        _check_labels("Branch", self.ids, self.labels)


@dataclass(frozen=True)
class PictureSlot:
    """A picture known before it is decoded: `tiles` of pixels, `tokens` of the decoder."""

    source: Path | bytes
    tiles: int
    tokens: int
    max_tiles: int | None = None  # as in `conversation.Picture`


@dataclass(frozen=True, eq=False)
class Sample:
    """`ids` with their `labels`, then `branches`; the image tokens among `ids` are those of `pictures`, in order."""

    ids: Ids
    labels: Ids
    branches: tuple[Branch, ...] = ()
    pictures: tuple[PictureSlot, ...] = ()
    where: str = ""

    def __post_init__(self) -> None:
        if len(self.ids):
            _check_labels("Sample", self.ids, self.labels)

    def __len__(self) -> int:
        return len(self.ids) + sum(len(branch.ids) for branch in self.branches)

    @property
    def tiles(self) -> int:
        """Tiles of all its pictures."""
        return sum(picture.tiles for picture in self.pictures)


def _check_labels(owner: str, ids: Ids, labels: Ids) -> None:
    if len(ids) != len(labels):
        raise ValueError(f"{owner}: labels: got {len(labels)}, want one for each of {len(ids)} ids")
    if labels[0] != IGNORE:
        raise ValueError(f"{owner}: labels: got {labels[0]} at the first token, want {IGNORE}")


class Samples(Protocol):
    """Sources of samples at random access: what the stream loader reads. Picklable; opens its files on first use."""

    @property
    def lengths(self) -> Sequence[int]:
        """Records of each source."""

    @property
    def weights(self) -> Sequence[float]:
        """How often each source is drawn from, by records; they sum to 1."""

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """(3, size, size)."""

    def sample(self, source: int, record: int) -> list[Sample]:
        """The record's samples: one, or several where its branches do not fit a stream. Raises BadRecord."""

    def pixels(self, picture: PictureSlot) -> Tensor:
        """[tiles, *tile_shape], fp32, normalized, so that zeros are the mean color.

        Raises CorruptImageError or OSError where the picture cannot be read.
        """
