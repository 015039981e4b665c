"""Pictures as a viewer shows them, from every source; what cannot be read is a CorruptImageError."""

import base64
import http.client
import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sail_model import CorruptImageError, images
from sail_model.images import load_image

RAMP = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)
RAMP_8 = np.rint(RAMP / 257).astype(np.uint8)


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def file(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(source: Any) -> NDArray[np.uint8]:
    image = load_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


# ---- sources --------------------------------------------------------------------------------------------------------
def test_every_source_gives_the_same_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = noise(20, 30, 3)
    path = tmp_path / "p.png"
    path.write_bytes(file(Image.fromarray(pixels), "PNG"))
    data, address = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}", "https://a.b/p.png"
    for source in (Image.fromarray(pixels), pixels, path, str(path), path.read_bytes(), data):
        assert np.array_equal(rgb(source), pixels)
    monkeypatch.setattr(images, "urlopen", lambda url, timeout: {address: path.open("rb")}[url])
    assert np.array_equal(rgb(address), pixels)


def test_what_cannot_be_fetched_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the machine, and not of the picture."""

    def broken(url: str, timeout: float) -> Any:
        raise http.client.IncompleteRead(b"half")

    monkeypatch.setattr(images, "urlopen", broken)
    for source in (tmp_path, tmp_path / "missing.png", "https://a.b/p.png"):
        with pytest.raises(OSError):
            load_image(source)


# ---- orientation ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_a_turned_camera(kind: str) -> None:
    image = Image.fromarray(noise(24, 40, 3))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = file(image, kind, exif=exif)
        shown = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        assert shown.shape == ((40, 24, 3) if orientation > 4 else (24, 40, 3))
        assert np.array_equal(rgb(data), shown)
        assert np.array_equal(rgb(Image.open(io.BytesIO(data))), shown)
        assert np.array_equal(load_image(load_image(data)), shown), "what was turned is turned again"


# ---- depth ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_are_scaled(kind: str) -> None:
    assert np.array_equal(rgb(file(Image.fromarray(RAMP), kind))[..., 0], RAMP_8)


def test_sixteen_bits_lie_down_and_are_scaled() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.array_equal(rgb(file(Image.fromarray(RAMP), "PNG", exif=exif))[..., 0], np.rot90(RAMP_8, -1))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_from_0_to_1(dtype: Any) -> None:
    values = (RAMP / 65535).astype(dtype)
    wanted = np.rint(values.astype(np.float64) * 255).astype(np.uint8)
    assert np.array_equal(rgb(values)[..., 1], wanted)
    if dtype == np.float32:
        assert np.array_equal(rgb(Image.fromarray(values))[..., 1], wanted)
        assert np.array_equal(rgb(file(Image.fromarray(values), "TIFF"))[..., 1], wanted)


@pytest.mark.parametrize("channels", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.bool_])
def test_arrays(channels: int, dtype: Any) -> None:
    """Equal to the 8-bit picture of the same; laid on white, alpha is rounded once more."""
    eight = noise(5, 7, max(channels, 1))
    if dtype == np.bool_:
        eight = np.where(eight > 127, 255, 0).astype(np.uint8)
    white = {np.uint16: 65535, np.float32: 1.0, np.bool_: 1}.get(dtype, 255)
    values = (eight / 255 * white).astype(dtype)
    color, alpha = (eight[..., :-1], eight[..., -1:] / 255) if channels in (2, 4) else (eight, 1.0)
    wanted = np.broadcast_to(255 + (color.astype(float) - 255) * alpha, (5, 7, 3))
    assert np.abs(rgb(values if channels else values[..., 0]) - wanted).max() <= (1 if channels in (2, 4) else 0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 4), np.int64), r"got int64 \[4, 4\]"),
        (np.zeros((3, 40, 60), np.uint8), r"\[H, W, 1 to 4\], got uint8 \[3, 40, 60\]"),
        (np.zeros(4, np.uint8), r"got uint8 \[4\]"),
        (np.zeros((0, 4), np.uint8), "empty, 4 x 0"),
        (np.array([[0.0, 255.0]]), r"from 0 to 1, got 0\.0 to 255\.0"),
        (np.array([[0.0, np.nan]]), "got nan to nan"),
        (Image.fromarray(np.array([[-0.5, 1.0]], np.float32)), r"from 0 to 1, got -0\.5"),
        (Image.new("I", (2, 2)), "do not say what is white"),
        (file(Image.new("I", (2, 2)), "TIFF"), "do not say what is white"),
        (Image.new("La", (2, 2)), "conversion from La"),
        (Image.new("L", (0, 2)), "empty, 0 x 2"),
    ],
)
def test_what_has_no_color_is_refused(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        load_image(source)
    assert isinstance(source, np.ndarray) or refused.type is CorruptImageError


COLOR_MODES = ["1", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"]


@pytest.mark.parametrize("mode", [*COLOR_MODES, "L", "LA", "F", "I;16", "I;16B", "I;16L"])
def test_every_mode_of_pillow(mode: str) -> None:
    assert rgb(Image.new(mode, (3, 2))).shape == (2, 3, 3)


# ---- transparency ---------------------------------------------------------------------------------------------------
def black_square(mode: str) -> Image.Image:
    """On transparent red."""
    image = Image.new("RGBA", (16, 8), (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (2, 2, 6, 6))
    return image.quantize(8) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("RGBA", "GIF"),
        ("RGBA", "WEBP"),
        ("RGBA", "TIFF"),
        ("RGBA", "ICO"),
    ],
)
def test_transparency_is_white(mode: str, kind: str) -> None:
    wanted = np.full((8, 16, 3), 255)
    wanted[2:6, 2:6] = 0
    options = dict(lossless=True, exact=True) if kind == "WEBP" else dict(sizes=[(16, 8)]) if kind == "ICO" else {}
    image = black_square(mode)
    assert np.array_equal(rgb(image), wanted)
    assert np.array_equal(rgb(file(image, kind, **options)), wanted)


def test_half_transparent_black_is_gray() -> None:
    assert rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 127))).tolist() == [[[128, 128, 128]]]


@pytest.mark.parametrize(("bits", "color"), [(8, "L"), (8, "RGB"), (16, "L")])
def test_a_transparent_color_of_a_png(bits: int, color: str) -> None:
    """Its tRNS chunk names one color; the second pixel differs from it in the last bit."""
    bands = {"L": 1, "RGB": 3}[color]
    pixels = b"".join(value.to_bytes(bits // 8, "big") * bands for value in (100, 101))
    key = struct.pack(">H", 100) * bands
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, {"L": 0, "RGB": 2}[color], 0, 0, 0)), (b"tRNS", key)]
    chunks += [(b"IDAT", zlib.compress(b"\0" + pixels)), (b"IEND", b"")]
    data = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    gray = 101 if bits == 8 else 0
    assert rgb(b"\x89PNG\r\n\x1a\n" + data).tolist() == [[[255] * 3, [gray] * 3]]


# ---- broken files ---------------------------------------------------------------------------------------------------
def example(kind: str) -> bytes | None:
    """A small file of a format, of the first mode that it can be written in; None where Pillow cannot write it."""
    picture = Image.fromarray(noise(12, 16, 3))
    for mode in ("RGB", "P", "L", "1"):
        try:
            return file(picture.convert(mode), kind)
        except (OSError, KeyError, ValueError):
            pass
    return None


Image.init()
# How the files begin that Pillow reads and cannot write, so that its plugin takes what follows.
BEGINNINGS = {
    "BUFR": b"BUFR", "CUR": b"\0\0\2\0\1\0", "DCX": b"\xb1\x68\xde\x3a", "EMF": b"\1\0\0\0" + bytes(36) + b" EMF",
    "FITS": b"SIMPLE  =                    T", "FLI": bytes(4) + b"\x11\xaf", "FTEX": b"FTEX", "GRIB": b"GRIB1234",
    "GBR": b"\0\0\0\x1c\0\0\0\2", "HDF5": b"\x89HDF\r\n\x1a\n", "IMT": b"\n\n", "IPTC": b"\x1c\x03\x3c\0\2",
    "MCIDAS": b"\0\0\0\0\0\0\0\4", "MPEG": b"\0\0\1\xb3", "PIXAR": b"\x80\xe8\0\0", "PSD": b"8BPS\0\1",
    "SUN": b"\x59\xa6\x6a\x95", "XPM": b"/* XPM */\n", "XVTHUMB": b"P7 332", "WMF": b"\xd7\xcd\xc6\x9a\0\0",
}  # fmt: skip


def broken(kind: str) -> list[bytes]:
    """Files with a byte flipped (each of the first 96, some of the others), cut, or with rubbish behind the start."""
    rng, data = random.Random(kind), example(kind)
    if data is None:
        return [BEGINNINGS.get(kind, b"") + rng.randbytes(length) for length in (0, 1, 8, 64, 600, 3000) * 8]
    places = [*range(min(96, len(data))), *(rng.randrange(len(data)) for _ in range(60))]
    flipped = [data[:at] + bytes([data[at] ^ rng.choice((1, 128, 255))]) + data[at + 1 :] for at in places]
    return flipped + [data[: rng.randrange(len(data))] for _ in range(20)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted({*Image.OPEN, *Image.SAVE, "EMF"} - {"EPS"}))  # which is Ghostscript's to read
def test_broken_files_are_corrupt_pictures(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read, where the damage does not show, or raise CorruptImageError and nothing else."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4096)  # a flipped size is no reason to allocate it
    refused = 0
    for data in broken(kind):
        try:
            load_image(data)
        except CorruptImageError:
            refused += 1
    assert refused


@pytest.mark.parametrize("kind", ["empty", "text", "half of a JPEG", "half of a PNG", "flipped bytes", "base64"])
def test_corrupt_pictures_raise_their_own_error(kind: str, tmp_path: Path) -> None:
    whole = file(Image.fromarray(noise(64, 64, 3)), "JPEG" if "JPEG" in kind else "PNG")
    flipped = whole[:100] + bytes(255 - byte for byte in whole[100:400]) + whole[400:]
    data = {"empty": b"", "text": b"not a picture", "flipped bytes": flipped}.get(kind, whole[: len(whole) // 2])
    path = tmp_path / "picture"
    path.write_bytes(data)
    url = "data:image/png;base64," + ("AAAAA" if kind == "base64" else base64.b64encode(data).decode())
    for source in (data, path, str(path), url):
        with pytest.raises(CorruptImageError, match="cannot decode"):
            load_image(source)
