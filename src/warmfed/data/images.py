"""Pictures and arrays of any kind become uint8 [3, height, width]; what cannot is told in one sentence."""

import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class UnreadableError(ValueError):
    """Why one picture or array cannot be used; callers collect these and report all of them at once."""


def decode(path: Path, size: int) -> Pixels:
    """The picture at `path`, squeezed to a square: uint8 [3, size, size].

    Turned upright as its EXIF data say; transparency is laid on white; 16-bit grey keeps its upper 8 bits.
    Raises UnreadableError where the file holds no whole picture, or more than some 179 million pixels (Pillow's bound).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures and odd metadata; the pixels decide here
            with Image.open(path) as picture:
                picture.draft(None, (4 * size, 4 * size))  # a large JPEG need not be decoded at full size
                return _square(_rgb(ImageOps.exif_transpose(picture)), size)
    except Image.DecompressionBombError as error:
        raise UnreadableError("has too many pixels; make it smaller") from error
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, struct.error) as error:
        raise UnreadableError("does not decode as an image; replace or remove it") from error


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        wide = np.asarray(picture).astype(np.int64).clip(0, 65535)
        return Image.fromarray((wide >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def _square(picture: Image.Image, size: int) -> Pixels:
    small = picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(small, dtype=np.uint8).transpose(2, 0, 1)


def from_array(values: Any, size: int | None) -> Pixels:
    """Images [n, h, w], [n, h, w, 1 or 3] or [n, 1 or 3, h, w] as uint8 [n, 3, h, w], squeezed to `size` where given.

    Takes uint8 from 0 to 255, or floats from 0 to 1. Raises UnreadableError for anything else.
    """
    array = np.asarray(values)
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim == 4 and array.shape[3] not in (1, 3) and array.shape[1] in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[3] not in (1, 3) or 0 in array.shape[1:3]:
        raise UnreadableError(f"images [n, h, w], [n, h, w, 3] or [n, 3, h, w] were expected, {list(np.shape(values))} came")
    if array.dtype.kind == "f" and (not array.size or (array.min() >= 0 and array.max() <= 1)):
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        span = f", {array.min():g} to {array.max():g}" if array.dtype.kind in "iuf" and array.size else ""
        raise UnreadableError(f"uint8 images or floats from 0 to 1 were expected, {array.dtype}{span} came")
    colour = np.broadcast_to(array, (*array.shape[:3], 3))
    if size is None or colour.shape[1:3] == (size, size) or not len(colour):
        return np.ascontiguousarray(colour.transpose(0, 3, 1, 2))
    return np.stack([_square(Image.fromarray(np.ascontiguousarray(image)), size) for image in colour])
