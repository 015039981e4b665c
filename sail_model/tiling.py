"""From a picture to tiles of pixels: dynamic tiling, a thumbnail, ImageNet normalization. PIL and numpy only.

A grid of i x j tiles that comes closest to the picture's aspect ratio is filled by resizing the picture to it; where
that gives more than one tile, the whole picture follows as one more, the thumbnail.
Source: released preprocessor of SAIL-VL2-2B; the tiling is InternVL 1.5's (arXiv 2404.16821, section 3.3).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .images import Images, flat_images, load_image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def tile_grid(width: int, height: int, tile: int, max_tiles: int) -> tuple[int, int]:
    """(columns, rows) of the grid nearest to width / height, with columns * rows <= max_tiles.

    Among grids of equal nearness the larger one wins as long as the picture has more than half its pixels.
    """
    grids = [(i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles // i + 1)]
    best, best_distance = (1, 1), float("inf")
    for i, j in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - i / j)
        larger_fits = width * height > 0.5 * tile * tile * i * j
        if distance < best_distance or (distance == best_distance and larger_fits):
            best, best_distance = (i, j), distance
    return best


class SailVL2ImageProcessor(BaseImageProcessor):
    """Pictures -> `pixel_values` [tiles, 3, image_size, image_size] fp32 and `num_tiles`, a count for each picture.

    `max_dynamic_patch` bounds the grid, so a picture gives at most one tile more. 10 is what the released processor
    uses (its config.json says 12); it can be given for each call. `image_mean` and `image_std` are ImageNet's.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        image_size: int = 448,
        max_dynamic_patch: int = 10,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.max_dynamic_patch = max_dynamic_patch
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(
        self,
        images: Images | None,
        max_dynamic_patch: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """`images`: one picture as `load_image` takes it, several, or a list for each prompt."""
        limit = self._limit(max_dynamic_patch)
        tiles = [self._tiles(load_image(image), limit) for image in flat_images(images)]
        size = self.image_size
        pixels = np.concatenate(tiles) if tiles else np.zeros((0, 3, size, size), np.float32)
        features = BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)
        features["num_tiles"] = [len(part) for part in tiles]
        return features

    def num_tiles(self, width: int, height: int, max_dynamic_patch: int | None = None) -> int:
        """How many tiles a picture shown in this size gives, thumbnail included: for token budgets before decoding.

        A file whose EXIF says that it is to be turned by 90 degrees has width and height the other way round.
        """
        columns, rows = tile_grid(width, height, self.image_size, self._limit(max_dynamic_patch))
        return columns * rows + (columns * rows > 1)

    def _limit(self, max_dynamic_patch: int | None) -> int:
        limit = self.max_dynamic_patch if max_dynamic_patch is None else max_dynamic_patch
        if limit < 1:
            raise ValueError(f"SailVL2ImageProcessor: max_dynamic_patch must be at least 1, got {limit}")
        return limit

    def _tiles(self, image: Image.Image, limit: int) -> NDArray[np.float32]:
        """Tiles row by row, then the thumbnail: [tiles, 3, image_size, image_size]."""
        size = self.image_size
        columns, rows = tile_grid(*image.size, size, limit)
        canvas = np.asarray(image.resize((columns * size, rows * size)))
        tiles = canvas.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
        if len(tiles) > 1:
            tiles = np.concatenate([tiles, np.asarray(image.resize((size, size)))[None]])
        mean, std = np.array(self.image_mean, np.float32), np.array(self.image_std, np.float32)
        scaled = (tiles.astype(np.float32) / 255 - mean) / std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
