"""What a worker process sends for a step: its streams' rows, in shared memory."""

import math
import pickle
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from training.data.streams import Drawn
from training.errors import InputError

Item = list[tuple[int, Drawn]] | InputError  # rows by stream; torch would bury an error in a traceback


@dataclass
class Parcel:
    """An item as one tensor, which lies in shared memory: the pipe carries its name and a few integers.

    So short a message is written whole or not at all. Of a longer one, a worker that is killed may leave a part, and
    the reader would wait for the rest for ever, as the other workers hold the pipe open.
    """

    data: Tensor  # uint8: the pixels of all rows, fp32, then the rows, pickled
    shape: list[int]  # of the pixels
    tiles: list[int]  # of each row

    @classmethod
    def of(cls, item: Item) -> "Parcel":
        """Takes the pixels out of the rows."""
        pixels, tiles = torch.zeros(0), []
        if not isinstance(item, InputError):
            tiles = [len(found.row.pixels) for _, found in item]
            pixels = torch.cat([found.row.pixels for _, found in item])
            elsewhere = cast(Tensor, None)  # a tensor without elements takes as long to pickle as all else
            item = [(number, replace(found, row=replace(found.row, pixels=elsewhere))) for number, found in item]
        rows = torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8)
        return cls(torch.cat([pixels.flatten().view(torch.uint8), rows]), list(pixels.shape), tiles)

    def opened(self) -> Item:
        """What was put in; its pixels are views."""
        size = 4 * math.prod(self.shape)
        item: Item = pickle.loads(self.data.numpy()[size:].data)
        if not isinstance(item, InputError):
            pixels = self.data[:size].view(torch.float32).view(self.shape)
            for (_, found), own in zip(item, pixels.split(self.tiles), strict=True):
                found.row.pixels = own
        return item
