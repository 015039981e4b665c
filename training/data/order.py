"""In which order a logical stream draws records: a pure function of seed, stream and how many were drawn before.

S streams. Stream s takes the elements s, s + S, s + 2S, ... of each source's shuffled epochs, one epoch after the
other, so all streams together see every record once an epoch, whatever processes they run in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_MASK = (1 << 64) - 1
_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread as evenly as can be
_ROUNDS = 6


def mix(*numbers: int) -> int:
    """64 well-mixed bits of these numbers (splitmix64's finalizer, once a number)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def permuted(index: int, size: int, key: int) -> int:
    """Where `index` comes in a pseudo-random order of range(size) that `key` picks; a bijection, without memory.

    A Feistel network on the next even number of bits, walked until it lands inside (Black and Rogaway, 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for turn in range(_ROUNDS):
            left, right = right, left ^ (mix(key, turn, right) & low)
        index = left << half | right
        if index < size:
            return index


@dataclass
class Order:
    """The draws of stream `stream` of `streams`; `draws` and `taken` are its whole state."""

    lengths: Sequence[int]
    weights: Sequence[float]
    seed: int
    stream: int
    streams: int
    draws: int = 0
    taken: list[int] = field(default_factory=list)  # from each source

    def __post_init__(self) -> None:
        self.taken = self.taken or [0] * len(self.lengths)
        self._offset = mix(self.seed, self.stream) / 2.0**64

    def next(self) -> tuple[int, int]:
        """(source, record) of the next draw."""
        source = self._source((self._offset + self.draws * _GOLDEN) % 1.0)
        epoch, index = divmod(self.stream + self.streams * self.taken[source], self.lengths[source])
        self.draws += 1
        self.taken[source] += 1
        return source, permuted(index, self.lengths[source], mix(self.seed, source, epoch))

    def _source(self, point: float) -> int:
        """The source whose share of [0, 1) holds `point`: evenly spread points keep its weight at every moment."""
        for source, weight in enumerate(self.weights):
            point -= weight
            if point < 0:
                return source
        return max(range(len(self.weights)), key=lambda number: self.weights[number])  # rounding of the sum

    def state_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"draws": self.draws, "taken": list(self.taken)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.draws, self.taken = state["draws"], list(state["taken"])
