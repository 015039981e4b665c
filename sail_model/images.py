"""Pictures from wherever they come, as 8-bit RGB as a viewer would show them."""

import http.client
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

ImageSource = Image.Image | NDArray[Any] | str | Path | bytes
Images = ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource] | None]

URL_TIMEOUT = 30.0  # seconds
# What undoes the rotation or reflection that a camera notes in EXIF, by its number there (EXIF 2.32, tag 0x0112).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class CorruptImageError(ValueError):
    """A picture that cannot be read or decoded. Data pipelines catch it to skip, count and report the sample."""


def load_image(source: ImageSource) -> Image.Image:
    """Decode a picture completely: 8-bit RGB, upright, on white where it is transparent.

    `source`: a PIL image, an array, a path, the bytes of a file, or a `data:`, `http:` or `https:` URL. An array is
    [H, W] or [H, W, C] with 1 to 4 channels (gray, gray and alpha, RGB, RGB and alpha), of uint8, uint16, bool, or
    floats from 0 to 1. 16 bits are scaled to 8; of several frames the first is taken.

    Raises CorruptImageError where data or image cannot be decoded, or leave open what is white (integers of 32 bits,
    floats beyond 0 to 1); OSError where a file or URL cannot be read; for arrays ValueError, for other types TypeError.
    """
    if isinstance(source, np.ndarray):
        source = _from_array(source)
    elif not isinstance(source, Image.Image | str | os.PathLike | bytes):
        raise TypeError(f"load_image: wanted a PIL image, array, path, URL or bytes, got {type(source).__name__}")
    if isinstance(source, str | os.PathLike):
        source = _read(os.fspath(source))
    try:
        image = _rgb(Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source)
    except MemoryError:
        raise
    except Exception as error:  # of a malformed file Pillow's decoders raise nearly anything
        raise CorruptImageError(f"load_image: cannot decode the picture: {error}") from error
    if not all(image.size):
        raise CorruptImageError(f"load_image: the picture is empty, {image.size[0]} x {image.size[1]} pixels")
    return image


def flat_images(images: Images | None) -> list[ImageSource]:
    """One picture, several, or a list of them for each prompt, as one list; None is no picture."""
    if images is None:
        return []
    if isinstance(images, list | tuple) or (isinstance(images, np.ndarray) and images.ndim == 4):
        return [image for item in images for image in flat_images(item)]
    return [images]  # type: ignore[list-item]


def _read(location: str) -> bytes:
    """The bytes of a file or URL."""
    if not location.startswith(("data:", "http://", "https://")):
        return Path(location).read_bytes()
    try:
        with urlopen(location, timeout=URL_TIMEOUT) as response:
            return bytes(response.read())
    except http.client.HTTPException as error:
        raise OSError(f"load_image: cannot read {location[:80]}: {error!r}") from error
    except ValueError as error:  # a data URL's base64
        raise CorruptImageError(f"load_image: cannot decode {location[:80]}: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright and on white."""
    image.load()
    upright = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if upright is not None:
        image = image.transpose(upright)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    shown = image.convert("RGB")
    shown.info = {}  # it is upright now: who loads it again must not turn it again
    return shown


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 bits, or of floats from 0 to 1, as 8 bits; Pillow's own conversion would clip it."""
    values = np.asarray(image)
    if image.mode == "I":
        if image.format not in ("PNG", "PPM"):  # of which Pillow reads 16 bits so
            raise ValueError("its pixels are integers of 32 bits, which do not say what is white")
        values = values.astype(np.uint16)
    gray = _from_array(values)
    if (transparent := image.info.get("transparency")) is not None:
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _from_array(values: NDArray[Any]) -> Image.Image:
    """The image of an array as `load_image` takes it."""
    kind = values.dtype.kind + str(values.dtype.itemsize)
    channels = values.shape[2] if values.ndim == 3 else 1
    if values.ndim not in (2, 3) or channels not in (1, 2, 3, 4) or kind not in ("u1", "u2", "b1", "f2", "f4", "f8"):
        raise ValueError(
            "load_image: wanted uint8, uint16, bool or floats from 0 to 1, [H, W] or [H, W, 1 to 4], got"
            f" {values.dtype} {list(values.shape)}"
        )
    if not values.size:
        raise ValueError(f"load_image: the picture is empty, {values.shape[1]} x {values.shape[0]} pixels")
    if kind != "u1":
        white = 65535 if kind == "u2" else 1
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= white):  # nor NaN
            raise ValueError(f"load_image: floats must be from 0 to 1, got {low} to {high}")
        values = np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8)
    return Image.fromarray(values[..., 0] if values.ndim == 3 and channels == 1 else values)
