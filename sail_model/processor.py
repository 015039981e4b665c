"""Text and pictures to model inputs: tiles, image tokens in the place of `<image>`, batches padded on the left."""

import re
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import ProcessorMixin, Qwen2Tokenizer
from transformers.feature_extraction_utils import BatchFeature

from .chat import CHAT_TEMPLATE, IMAGE_PLACEHOLDER, with_data_urls
from .images import Images, ImageSource, flat_images
from .tiling import SailVL2ImageProcessor
from .tokenizer import IMAGE_CONTEXT, IMAGE_END, IMAGE_START

MARKS_ANSWERS = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 18)


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
        truncation: bool | None = False,
        max_dynamic_patch: int | None = None,
        padding_side: str = "left",
        return_offsets_mapping: bool = False,
        return_text_replacement_offsets: bool = False,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` [B, L], and `pixel_values` [tiles, 3, S, S] where there are pictures.

        `text`: one prompt or several; each `<image>` in it takes the next picture. `images`: one picture, a list in
        the order of the placeholders, or a list for each prompt; see `load_image` for what a picture may be. Prompts
        are padded to the longest, or with padding="max_length" to `max_length` tokens.
        `videos` and `audio` are what transformers' own code passes; SAIL-VL2 takes a video as a list of pictures.
        `return_offsets_mapping` adds `offset_mapping`, lists of the (start, end) characters of each token in its
        prompt with pictures expanded; `return_text_replacement_offsets` how these follow from the prompts as given.

        Nothing is ever truncated: a prompt of more than `max_length` tokens raises ValueError, as do pictures and
        placeholders that differ in number. A picture that cannot be decoded raises CorruptImageError.
        """
        prompts = [text] if isinstance(text, str) else list(text or ())
        if not prompts or videos or audio:
            raise ValueError("SailVL2Processor: wanted text, with or without images; not videos, not audio")
        if truncation or (padding == "max_length" and max_length is None):
            raise ValueError("SailVL2Processor: nothing is truncated; padding='max_length' needs a max_length")
        pictures = self._flatten(images, prompts)
        features = self.image_processor(pictures, max_dynamic_patch, return_tensors=return_tensors)
        num_tiles = features.pop("num_tiles")
        encoded = self.tokenizer(
            self.expand(prompts, num_tiles),
            padding=padding,
            max_length=max_length if padding == "max_length" else None,
            padding_side=padding_side,
            return_offsets_mapping=return_offsets_mapping,
            add_special_tokens=False,
        )
        longest = max(map(len, encoded["input_ids"]))
        if max_length is not None and longest > max_length:
            raise ValueError(
                f"SailVL2Processor: a prompt has {longest} tokens, more than max_length={max_length}; it is not"
                f" truncated, as that would cut pictures. Lower max_dynamic_patch or shorten the text"
            )
        offsets = encoded.pop("offset_mapping") if return_offsets_mapping else None
        out = BatchFeature({**encoded, **(features if pictures else {})}, tensor_type=return_tensors)
        if offsets is not None:
            out["offset_mapping"] = offsets
        if return_text_replacement_offsets:
            out["text_replacement_offsets"] = self._replacements(prompts, num_tiles)
        return out

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Messages, or a list of conversations, as prompts; with `tokenize=True, return_dict=True` as model inputs.

        Everything else as in transformers. A picture is a part {"type": "image"} with an "image" as `load_image` takes
        it, a "path", a "url" (`data:` too) or its file as "base64"; or OpenAI's {"type": "image_url", ...}.
        `return_assistant_tokens_mask=True` adds `assistant_masks` [B, L]: 1 for the tokens of answers with their
        `<|im_end|>`. It needs transformers >= 5.18: before, it misses answers that start with a line break.
        """
        masks = kwargs.get("return_assistant_tokens_mask", False)
        if masks and not MARKS_ANSWERS:
            raise ValueError("SailVL2Processor: return_assistant_tokens_mask needs transformers >= 5.18")
        out = super().apply_chat_template(with_data_urls(conversation), *args, **kwargs)
        if masks and isinstance(out, BatchFeature) and isinstance(out["input_ids"], torch.Tensor):
            out["assistant_masks"] = torch.as_tensor(out["assistant_masks"])
        return out

    def expand(self, prompts: Sequence[str], num_tiles: Sequence[int]) -> list[str]:
        """Replace each `<image>`, over all prompts in order, by `<img>`, its image tokens and `</img>`."""
        counts = iter(num_tiles)
        expanded = []
        for prompt in prompts:
            first, *rest = prompt.split(IMAGE_PLACEHOLDER)
            expanded.append(first + "".join(self.image_span(next(counts)) + part for part in rest))
        return expanded

    def _replacements(self, prompts: Sequence[str], num_tiles: Sequence[int]) -> list[list[dict[str, Any]]]:
        """For each prompt and placeholder, its characters before and after `expand`, as transformers notes them."""
        counts = iter(num_tiles)
        replaced = []
        for prompt in prompts:
            spans, grown = list[dict[str, Any]](), 0
            for match in re.finditer(re.escape(IMAGE_PLACEHOLDER), prompt):
                start, length = match.start() + grown, len(self.image_span(next(counts)))
                spans.append({"type": "image", "span": match.span(), "new_span": (start, start + length)})
                grown += length - len(IMAGE_PLACEHOLDER)
            replaced.append(spans)
        return replaced

    def image_span(self, num_tiles: int) -> str:
        """The tokens that one picture of `num_tiles` tiles takes in a prompt, as text."""
        return IMAGE_START + IMAGE_CONTEXT * (self.tokens_per_tile * num_tiles) + IMAGE_END

    def num_image_tokens(self, width: int, height: int, max_dynamic_patch: int | None = None) -> int:
        """Tokens that a picture of this size takes, with its `<img>` and `</img>`: for budgets before any decoding."""
        return self.tokens_per_tile * self.image_processor.num_tiles(width, height, max_dynamic_patch) + 2

    def _flatten(self, images: Images | None, prompts: Sequence[str]) -> list[ImageSource]:
        """Pictures in the order of their placeholders; the numbers must agree, of each prompt if that is given."""
        wanted: Any = [prompt.count(IMAGE_PLACEHOLDER) for prompt in prompts]
        groups = images if isinstance(images, list | tuple) and images else None
        if groups and all(group is None or isinstance(group, list | tuple) for group in groups):
            given: Any = [len(flat_images(group)) for group in groups]
        else:
            wanted, given = sum(wanted), len(flat_images(images))
        if given != wanted:
            raise ValueError(
                f"SailVL2Processor: the prompts hold {wanted} {IMAGE_PLACEHOLDER} placeholders, but come with"
                f" {given} pictures"
            )
        return flat_images(images)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]
