"""What a worker process sends for a step: its streams' rows, in shared memory."""

import pickle
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from training.data.streams import Drawn
from training.errors import InputError

Item = list[tuple[int, Drawn]] | InputError  # rows by stream; torch would bury an error in a traceback


@dataclass
class Parcel:
    """An item as two tensors, which lie in shared memory: the pipe carries their names and a few integers.

    So short a message is written whole or not at all. Of a longer one, a worker that is killed may leave a part, and
    the reader would wait for the rest for ever, as the other workers hold the pipe open.
    """

    rows: Tensor  # pickled, uint8
    pixels: Tensor  # of all rows
    tiles: list[int]  # of each row

    @classmethod
    def of(cls, item: Item) -> "Parcel":
        """Takes the pixels out of the rows."""
        pixels, tiles = torch.zeros(0), []
        if not isinstance(item, InputError):
            tiles = [len(found.row.pixels) for _, found in item]
            pixels = torch.cat([found.row.pixels for _, found in item])
            bare = [replace(found, row=replace(found.row, pixels=torch.zeros(0))) for _, found in item]
            item = [(number, found) for (number, _), found in zip(item, bare, strict=True)]
        return cls(torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8), pixels, tiles)

    def opened(self) -> Item:
        """What was put in; its pixels are views."""
        item: Item = pickle.loads(self.rows.numpy().tobytes())
        if not isinstance(item, InputError):
            for (_, found), pixels in zip(item, self.pixels.split(self.tiles), strict=True):
                found.row.pixels = pixels
        return item
