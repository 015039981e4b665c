"""Text and pictures to model inputs: tiles, image tokens in the place of `<image>`, batches padded on the left."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import ProcessorMixin, Qwen2Tokenizer
from transformers.feature_extraction_utils import BatchFeature

from .chat import CHAT_TEMPLATE, IMAGE_PLACEHOLDER
from .images import ImageSource, SailVL2ImageProcessor
from .tokenizer import IMAGE_CONTEXT, IMAGE_END, IMAGE_START

Images = ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource]]


class SailVL2Processor(ProcessorMixin):
    """A tokenizer and an image processor as one callable.

    `tokens_per_tile` is `SailVL2Config.tokens_per_tile`. `apply_chat_template` turns messages into a prompt, and with
    `tokenize=True, return_dict=True` into model inputs; `thinking=True` asks a thinking model to reason first.
    """

    def __init__(
        self,
        image_processor: SailVL2ImageProcessor,
        tokenizer: Qwen2Tokenizer,
        chat_template: str | None = None,
        tokens_per_tile: int = 256,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.tokens_per_tile = tokens_per_tile

    def __call__(
        self,
        images: Images | None = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        *,
        padding: bool | str = True,
        max_length: int | None = None,
        max_dynamic_patch: int | None = None,
        padding_side: str = "left",
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` [B, L], and `pixel_values` [tiles, 3, S, S] where there are pictures.

        `text`: one prompt or several; each `<image>` in it takes the next picture. `images`: one picture, a list in
        the order of the placeholders, or a list for each prompt. Prompts are padded to the longest.
        `videos` and `audio` are what transformers' own code passes; SAIL-VL2 takes a video as a list of pictures.

        Nothing is ever truncated: a prompt of more than `max_length` tokens raises ValueError, as do pictures and
        placeholders that differ in number. A picture that cannot be decoded raises CorruptImageError.
        """
        if text is None or videos or audio:
            raise ValueError("SailVL2Processor: wanted text, with or without images; not videos, not audio")
        prompts = [text] if isinstance(text, str) else list(text)
        pictures = self._flatten(images, prompts)
        features = self.image_processor(pictures, max_dynamic_patch, return_tensors=return_tensors)
        expanded = self.expand(prompts, features.pop("num_tiles"))
        encoded = self.tokenizer(
            expanded,
            padding=padding,
            padding_side=padding_side,
            return_tensors=return_tensors,
            add_special_tokens=False,
        )
        longest = max(len(ids) for ids in encoded["input_ids"])
        if max_length is not None and longest > max_length:
            raise ValueError(
                f"SailVL2Processor: a prompt has {longest} tokens, more than max_length={max_length}; it is not"
                f" truncated, as that would cut pictures. Lower max_dynamic_patch or shorten the text"
            )
        return BatchFeature({**encoded, **(features if pictures else {})})

    def expand(self, prompts: Sequence[str], num_tiles: Sequence[int]) -> list[str]:
        """Replace each `<image>`, over all prompts in order, by `<img>`, its image tokens and `</img>`."""
        counts = iter(num_tiles)
        expanded = []
        for prompt in prompts:
            first, *rest = prompt.split(IMAGE_PLACEHOLDER)
            expanded.append(first + "".join(self.image_span(next(counts)) + part for part in rest))
        return expanded

    def image_span(self, num_tiles: int) -> str:
        """The tokens that one picture of `num_tiles` tiles takes in a prompt, as text."""
        return IMAGE_START + IMAGE_CONTEXT * (self.tokens_per_tile * num_tiles) + IMAGE_END

    def num_image_tokens(self, width: int, height: int, max_dynamic_patch: int | None = None) -> int:
        """Tokens that a picture of this size takes, with its `<img>` and `</img>`: for budgets before any decoding."""
        return self.tokens_per_tile * self.image_processor.num_tiles(width, height, max_dynamic_patch) + 2

    def _flatten(self, images: Images | None, prompts: Sequence[str]) -> list[ImageSource]:
        """Pictures in the order of their placeholders; the numbers must agree."""
        wanted = [prompt.count(IMAGE_PLACEHOLDER) for prompt in prompts]
        items: list[Any] = [] if images is None else [images] if _is_image(images) else list(images)  # type: ignore[arg-type]
        if items and all(not _is_image(item) for item in items):
            if [len(item) for item in items] != wanted:
                raise ValueError(
                    f"SailVL2Processor: the prompts hold {wanted} {IMAGE_PLACEHOLDER} placeholders, but come with"
                    f" {[len(item) for item in items]} pictures"
                )
            items = [image for item in items for image in item]
        if len(items) != sum(wanted):
            raise ValueError(
                f"SailVL2Processor: the prompts hold {sum(wanted)} {IMAGE_PLACEHOLDER} placeholders, but come with"
                f" {len(items)} pictures"
            )
        return items

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def _is_image(value: object) -> bool:
    return isinstance(value, Image.Image | np.ndarray | str | bytes) or hasattr(value, "__fspath__")
