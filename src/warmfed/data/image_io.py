"""Convert pictures and arrays to uint8 [channels, height, width]; errors are one sentence each."""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..utils.files import read_regular

Pixels = NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "BMP", "PPM", "GIF", "WEBP", "TIFF", "DIB", "MPO", "JPEG2000", "ICO", "PCX", "SGI", "TGA", "AVIF")
"""Formats that Pillow decodes itself, the common ones first; not PostScript, which runs another program."""
MOST = 2**30
"""Maximum size of an encoded picture in bytes."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm")


DEEP = 65535
"""Largest value of a 16-bit pixel."""


_FREELY = 2**24
"""Pixels that every picture may have."""
_RATIO = 5000
"""Most pixels for each byte beyond `_FREELY`; photographs and scans have less than 100."""


class Facts(NamedTuple):
    """What a picture was before its conversion."""

    width: int
    height: int
    deep: int
    """Largest value of its 16-bit grey pixels plus 1; 0 if it has 8 bits."""
    frames: int
    """1 if it has more frames or pages than the one that is used, else 0."""


class UnreadableError(ValueError):
    """One picture or array cannot be used; callers collect these errors and report them together."""


def decode(path: Path, size: int, channels: int = 3, max_value: int = 0) -> Pixels:
    """Return the picture at `path`, resized to a square: uint8 [channels, size, size].

    The EXIF orientation is applied; transparent pixels become white; of several frames the first is used.

    Args:
        path: the picture.
        size: side of the square in pixels.
        channels: 3 (colour) or 1 (grey).
        max_value: value of 16-bit grey pixels that becomes white; 0: their upper 8 bits are kept.

    Raises:
        UnreadableError: if the file cannot be read, is not a regular file, has no complete picture, or has more than about
            89 million pixels (Pillow's limit).
    """
    try:
        data = read_regular(path, MOST)
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror or error}; check the path and its permissions") from error
    with quiet():
        return picture(data, size, channels, max_value)[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Raise for pictures with too many pixels, and silence Pillow's other warnings. Use it outside of threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def picture(source: bytes, size: int, channels: int, max_value: int = 0) -> tuple[Pixels, Facts]:
    """Decode a picture as `decode` does; return its pixels and its facts. Call it within `quiet`."""
    try:
        with Image.open(io.BytesIO(source), formats=FORMATS) as opened:
            had = opened.size
            if had[0] * had[1] > max(_FREELY, _RATIO * len(source)):
                raise UnreadableError(f"declares {had[0]:,}×{had[1]:,} pixels in {len(source):,} bytes; save it again")
            # a photograph of a phone (MPO) has a preview or a depth map as its second frame
            frames = opened.format != "MPO" and bool(getattr(opened, "is_animated", False))
            opened.draft(None, (4 * size, 4 * size))  # a large JPEG need not be decoded at full size
            upright = ImageOps.exif_transpose(opened)
            shown, deep = _eight_bits(upright, max_value)
            shown = _colour(shown) if channels == 3 else _colour(shown).convert("L")
            return _square(shown, size), Facts(*had, deep, int(frames))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableError(f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller") from error
    except UnreadableError:
        raise
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, struct.error) as error:
        raise UnreadableError("does not decode as an image; replace or remove it") from error


def _eight_bits(picture: Image.Image, max_value: int) -> tuple[Image.Image, int]:
    """Return the picture with 8 bits, and `Facts.deep`."""
    if not picture.mode.startswith("I"):
        return picture, 0
    wide = np.asarray(picture).astype(np.int64)
    low, high = int(wide.min(initial=0)), int(wide.max(initial=0))
    if low < 0 or high > (max_value or DEEP):
        advice = "set data.options.max_value to the largest value" if max_value and low >= 0 else "save it with 8 or 16 bits"
        raise UnreadableError(f"has pixel values from {low} to {high}, expected 0 to {max_value or DEEP}; {advice}")
    small = (wide * 510 + max_value) // (2 * max_value) if max_value else wide >> 8
    return Image.fromarray(small.astype(np.uint8)), high + 1


def _colour(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise UnreadableError("holds floating-point pixels, of unknown range; save it with 8 or 16 bits")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def _square(picture: Image.Image, size: int) -> Pixels:
    small = picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(small, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def from_array(values: Any, size: int | None, channels: int = 3) -> Pixels:
    """Return images as uint8 [n, channels, h, w].

    Args:
        values: [n, h, w], [n, h, w, 1 or 3] or [n, 1 or 3, h, w]; uint8 from 0 to 255, or floats from 0 to 1.
        size: side of the resized square images; None keeps the size.
        channels: 3 (colour) or 1 (grey).

    Raises:
        UnreadableError: if the values have another shape, type or range.
    """
    array = np.asarray(values)
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim == 4 and array.shape[3] not in (1, 3) and array.shape[1] in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[3] not in (1, 3) or 0 in array.shape[1:3]:
        raise UnreadableError(f"expected images [n, h, w], [n, h, w, 3] or [n, 3, h, w], got {list(np.shape(values))}")
    if array.dtype.kind == "f" and (not array.size or (array.min() >= 0 and array.max() <= 1)):
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        span = f", {array.min():g} to {array.max():g}" if array.dtype.kind in "iuf" and array.size else ""
        raise UnreadableError(f"expected uint8 images or floats from 0 to 1, got {array.dtype}{span}")
    if channels == 1 and array.shape[3] == 3:
        # Pillow's own luma: (19595 R + 38470 G + 7471 B + 2^15) / 2^16
        array = ((array.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32) + 0x8000) >> 16).astype(np.uint8)[
            ..., None
        ]
    colour = np.broadcast_to(array, (*array.shape[:3], channels))
    if size is None or colour.shape[1:3] == (size, size) or not len(colour):
        return np.ascontiguousarray(colour.transpose(0, 3, 1, 2))
    flat = colour[..., 0] if channels == 1 else colour
    return np.stack([_square(Image.fromarray(np.ascontiguousarray(image)), size) for image in flat])
