"""Conversations as tokens, in the model's own chat format; pictures are counted from their headers, not decoded.

A turn is `<|im_start|>role`, newline, content, `<|im_end|>`, as `sail_model.chat` has it; nothing stands between turns.
Special tokens split the text, so a turn's tokens are those of the whole text. Learned are the assistant's turns, from
what follows the generation prompt to `<|im_end|>`, tokenized apart from that prompt, as a model meets and writes them:
of an answer that begins with line breaks this differs from the whole text, where a token is half prompt, half answer.
A conversation without a system message, or with an empty one, has none.
"""

import io
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from sail_model import SailVL2Processor
from sail_model.tokenizer import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, TURN_END
from training.data.conversation import BadRecord, Conversation, Picture, Text, Turn
from training.data.mixture import Mixture
from training.data.sample import IGNORE, Branch, Ids, PictureSlot, Sample

TURN_START = "<|im_start|>"
# short questions and answers come again and again; others would fill memory, about 36 bytes a token
CACHED, CACHED_CHARACTERS = 20_000, 200
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class Encoder:
    """Conversations to samples with a processor's tokenizer and tiling."""

    def __init__(self, processor: SailVL2Processor, max_tiles: int | None = None) -> None:
        self.processor, self.max_tiles = processor, max_tiles
        pictures = processor.image_processor
        self.image_token = int(processor.tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT))
        self.image_end = int(processor.tokenizer.convert_tokens_to_ids(IMAGE_END))
        self.patch_tokens = processor.tokens_per_tile
        self.tile_shape = (3, pictures.image_size, pictures.image_size)
        self._cached = lru_cache(maxsize=CACHED)(self._tokens)

    def __getstate__(self) -> dict[str, Any]:
        return {"processor": self.processor, "max_tiles": self.max_tiles}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def encode(self, conversation: Conversation) -> Sample:
        """Its sample, however long. Raises BadRecord where a picture's header cannot be read."""
        slots = self._slots(conversation)
        if not conversation.branches:
            ids, labels, pictures = self._turns(conversation.turns, slots)
            return Sample(ids, labels, (), pictures, conversation.where)
        whole = [self._turns(_joined(conversation.turns, branch), slots) for branch in conversation.branches]
        shared = self._shared([ids for ids, *_ in whole])
        ids, labels, pictures = whole[0]
        if any(found != pictures for *_, found in whole):
            raise BadRecord(conversation.where, "a branch has a picture of its own")
        branches = tuple(Branch(ids[shared:], labels[shared:]) for ids, labels, _ in whole)
        return Sample(ids[:shared], labels[:shared], branches, pictures, conversation.where)

    def _shared(self, sequences: Sequence[Ids]) -> int:
        """How many first tokens all branches have in common, up to the end of the last picture."""
        first = sequences[0]
        ends = np.flatnonzero(first == self.image_end)
        length = int(ends[-1]) + 1 if len(ends) else 0
        return length if all(np.array_equal(ids[:length], first[:length]) for ids in sequences) else 0

    def _slots(self, conversation: Conversation) -> dict[int, PictureSlot]:
        """Of each picture, by its identity: branches show the same ones."""
        turns = [*conversation.turns, *(turn for branch in conversation.branches for turn in branch)]
        pictures = [part for turn in turns for part in turn.parts if isinstance(part, Picture)]
        return {id(picture): self._slot(picture, conversation.where) for picture in pictures}

    def _turns(self, turns: Sequence[Turn], slots: dict[int, PictureSlot]) -> tuple[Ids, Ids, tuple[PictureSlot, ...]]:
        ids: list[int] = []
        labels: list[int] = []
        pictures: list[PictureSlot] = []
        for turn in turns:
            if turn.role == "system" and not any(isinstance(part, Text) and part.text for part in turn.parts):
                continue  # an empty one is none, as the chat template has it
            content, shown = self._content(turn, slots)
            pictures += shown
            if turn.learn:
                head = self._tokenize(f"{TURN_START}{turn.role}\n")
                learned = self._expanded(self._tokenize(content + TURN_END), shown)
                ids += head + learned
                labels += [IGNORE] * len(head) + learned
            else:
                given = self._expanded(self._tokenize(f"{TURN_START}{turn.role}\n{content}{TURN_END}"), shown)
                ids += given
                labels += [IGNORE] * len(given)
        return np.array(ids, np.int32), np.array(labels, np.int32), tuple(pictures)

    def _content(self, turn: Turn, slots: dict[int, PictureSlot]) -> tuple[str, list[PictureSlot]]:
        """A turn's text as the chat template has it, with one image token for each picture: see `_expanded`."""
        text, pictures = "", []
        for part in turn.parts:
            if isinstance(part, Text):
                text += part.text
            else:
                slot = slots[id(part)]
                text += f"{IMAGE_START}{IMAGE_CONTEXT}{IMAGE_END}\n"
                pictures.append(slot)
        return text, pictures

    def _expanded(self, ids: list[int], pictures: Sequence[PictureSlot]) -> list[int]:
        """The tokens with each image token as often as its picture takes it; tokenizing them all takes ms."""
        found: list[int] = []
        start = 0
        for picture in pictures:
            place = ids.index(self.image_token, start)
            found += ids[start:place] + [self.image_token] * picture.tokens
            start = place + 1
        return found + ids[start:]

    def _tokenize(self, text: str) -> list[int]:
        return self._cached(text) if len(text) <= CACHED_CHARACTERS else self._tokens(text)

    def _tokens(self, text: str) -> list[int]:
        found: list[int] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def _slot(self, picture: Picture, where: str) -> PictureSlot:
        limit = min(
            picture.max_tiles or 10**6, self.max_tiles or 10**6, self.processor.image_processor.max_dynamic_patch
        )
        try:
            source = io.BytesIO(picture.source) if isinstance(picture.source, bytes) else picture.source
            with Image.open(source) as image:
                width, height = image.size
                # of a PNG, getexif would decode all its pixels, in case EXIF comes behind them; TIFF is opened upright
                turned = (
                    image.format != "TIFF" and Image.Image.getexif(image).get(ExifTags.Base.Orientation) in _SIDEWAYS
                )
                if turned:
                    width, height = height, width
        except Exception as error:  # of a malformed file Pillow raises nearly anything
            if isinstance(error, MemoryError):
                raise
            raise BadRecord(where, f"{type(error).__name__}: {error}") from error
        if not width or not height:
            raise BadRecord(where, f"the picture is empty, {width} x {height} pixels")
        tiles = self.processor.image_processor.num_tiles(width, height, limit)
        return PictureSlot(picture.source, tiles, tiles * self.patch_tokens, limit)

    def pixels(self, picture: PictureSlot) -> Tensor:
        """The tiles that the header promised, [tiles, 3, size, size]."""
        prepared = self.processor.image_processor([picture.source], picture.max_tiles, return_tensors="pt")[
            "pixel_values"
        ]
        assert isinstance(prepared, Tensor)
        if len(prepared) != picture.tiles:
            raise OSError(f"the picture has {len(prepared)} tiles, its header said {picture.tiles}")
        return prepared.to(torch.float32)


def _joined(turns: Sequence[Turn], branch: Sequence[Turn]) -> list[Turn]:
    """A conversation of a branch: its first turn goes on with the last one before it, if that has its role."""
    if turns and branch and turns[-1].role == branch[0].role:
        first = Turn(branch[0].role, turns[-1].parts + branch[0].parts, branch[0].learn)
        return [*turns[:-1], first, *branch[1:]]
    return [*turns, *branch]


def split_to_fit(sample: Sample, capacity: int) -> Iterator[Sample]:
    """Parts of a sample's branches, each with the sample's own tokens and at most `capacity` tokens in all.

    Raises BadRecord where its own tokens and one branch do not fit, or a conversation does not: nothing is truncated.
    """
    own = len(sample.ids)
    longest = own + max((len(branch.ids) for branch in sample.branches), default=0)
    if longest > capacity:
        raise BadRecord(sample.where, f"has {longest} tokens, a stream holds {capacity}; see --stream-length")
    if len(sample) <= capacity:
        yield sample
        return
    chosen: list[Branch] = []
    room = capacity - own
    for branch in sample.branches:
        if len(branch.ids) > room:
            yield Sample(sample.ids, sample.labels, tuple(chosen), sample.pictures, sample.where)
            chosen, room = [], capacity - own
        chosen.append(branch)
        room -= len(branch.ids)
    yield Sample(sample.ids, sample.labels, tuple(chosen), sample.pictures, sample.where)


class EncodedMixture:
    """A mixture as `training.data.sample.Samples`: what the stream loader reads."""

    def __init__(
        self, mixture: Mixture, processor: SailVL2Processor, *, capacity: int, max_tiles: int | None = None
    ) -> None:
        self.mixture, self.capacity = mixture, capacity
        self.encoder = Encoder(processor, max_tiles)
        self.lengths = [len(source) for source in mixture.sources]
        self.weights = list(mixture.weights)
        self.tile_shape = self.encoder.tile_shape
        self.fingerprint = mixture.fingerprint

    def sample(self, source: int, record: int) -> list[Sample]:
        """The record's samples. Raises BadRecord."""
        return self.encoded(self.mixture.sources[source].conversation(record))

    def encoded(self, conversation: Conversation) -> list[Sample]:
        """A conversation's samples, as `sample`."""
        return list(split_to_fit(self.encoder.encode(conversation), self.capacity))

    def pixels(self, picture: PictureSlot) -> Tensor:
        """As `Samples.pixels`."""
        return self.encoder.pixels(picture)
