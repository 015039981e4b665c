"""`generate` from prompts with pictures: `pixel_values` has a row for each tile, and not one for each prompt.

B prompts, L tokens, N tiles of all pictures of the batch, P image tokens of a tile, D hidden.
transformers repeats and slices what it hands to the model along the first dimension; here tiles stay with their prompt.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin

from .config import SailVL2Config

TILE_INPUTS = ("pixel_values", "image_features")


class TileGenerationMixin(GenerationMixin):
    """Of a model whose `get_image_features` gives features [N, P, D]."""

    config: SailVL2Config
    get_image_features: Callable[[Tensor], Tensor]

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Each prompt `expand_size` times, for beams or sampled sequences. Its tiles follow it, encoded once.

        Raises ValueError where tiles and image tokens, or the rows of a filled cache and the sequences, differ.
        """
        if kwargs.get("mm_encoder_outputs") is not None:
            raise ValueError("SailVL2: give pixel_values or image_features to generate, not mm_encoder_outputs")
        check_rows(kwargs.get("past_key_values"), expand_size * len(input_ids))
        pixel_values, features = (kwargs.pop(name, None) for name in TILE_INPUTS)
        if expand_size > 1 and (pixel_values is not None or features is not None):
            if features is None:
                features, pixel_values = self.get_image_features(pixel_values), None
            tiles = features.split(self._tiles_by_prompt(input_ids, len(features)))
            features = torch.cat([of_prompt for of_prompt in tiles for _ in range(expand_size)])
        library: Any = super()  # types its methods for models of its own
        expanded, kwargs = library._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        given = zip(TILE_INPUTS, (pixel_values, features), strict=True)
        return expanded, kwargs | {name: tiles for name, tiles in given if tiles is not None}

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, tokenizer: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The inputs of one step; of the tiles, those whose image tokens are not in the cache yet.

        `tokenizer` is what `generate` takes for its `stop_strings`, and nothing for the model.
        """
        library: Any = super()
        inputs: dict[str, Any] = library.prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        new = inputs.get("input_ids")
        cached = 0 if new is None else input_ids.shape[1] - new.shape[1]
        for name in TILE_INPUTS:
            if (tiles := kwargs.get(name)) is not None:
                inputs[name] = self._uncached(tiles, input_ids, cached) if cached else tiles
        return inputs

    def _assisted_decoding(self, *args: Any, past_key_values: Cache | None = None, **kwargs: Any) -> Any:
        """docs/decisions, model-kept-cache-assisted."""
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            raise ValueError(
                "SailVL2: assisted decoding needs empty past_key_values: transformers would put the prompt's tokens"
                " into a filled cache a second time"
            )
        library: Any = super()
        return library._assisted_decoding(*args, past_key_values=past_key_values, **kwargs)

    def _uncached(self, tiles: Tensor, input_ids: Tensor, cached: int) -> Tensor | None:
        """Of the tiles of all tokens, those behind the first `cached`; all where they already are no others."""
        if input_ids.shape[1] - cached == 1:
            return None  # a token that was generated: no reason to wait for the device
        new = self._image_tokens(input_ids[:, cached:])
        if new.sum() == len(tiles) * self.config.tokens_per_tile:
            return tiles
        by_prompt = tiles.split(self._tiles_by_prompt(input_ids, len(tiles)))
        counts = (new // self.config.tokens_per_tile).tolist()
        left = torch.cat([rows[len(rows) - count :] for rows, count in zip(by_prompt, counts, strict=True)])
        return left if len(left) else None

    def _tiles_by_prompt(self, input_ids: Tensor, given: int) -> list[int]:
        """[B] counts. Raises ValueError where the prompts have image tokens for other than the given tiles."""
        tokens, of_tile = self._image_tokens(input_ids), self.config.tokens_per_tile
        if (tokens % of_tile).any() or tokens.sum() != given * of_tile:
            raise ValueError(
                f"SailVL2: the prompts hold {tokens.tolist()} image tokens, but the {given} tiles given have"
                f" {of_tile} each; give the tiles of all pictures of the prompts"
            )
        return (tokens // of_tile).tolist()

    def _image_tokens(self, input_ids: Tensor) -> Tensor:
        """[B] counts."""
        return (input_ids == self.config.image_token_id).sum(1)


def check_rows(cache: Cache | None, wanted: int) -> None:
    """Raise ValueError where a filled cache has other than the wanted number of rows."""
    if cache is None or cache.get_seq_length() == 0:
        return
    layer: Any = cache.layers[0]
    if (rows := layer.keys.shape[0]) != wanted:
        raise ValueError(
            f"SailVL2: past_key_values holds {rows} rows, but {wanted} sequences are generated; for several of each"
            f" prompt repeat it first: past_key_values.batch_repeat_interleave(n)"
        )
