"""`digits4`: real handwriting at four sites with the same classes and four styles; needs no download.

Source: scikit-learn's `load_digits` (1,797 digits of 43 people, 8x8, 17 grey levels; E. Alpaydin, C. Kaynak, "Optical
recognition of handwritten digits", UCI 1998) and, behind the strokes of one site, the two photographs of
`load_sample_images`.

Every random number comes from a frozen stream and all arithmetic is on integers, so the bytes are the same on every
machine. The photographs are JPEG files and need a decoder that agrees with libjpeg.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ...core.rng import random_state
from ...utils.settings import check_seed
from ..federation import Federation, Site
from ..partition import dirichlet, iid

Ints = NDArray[np.int64]
Random = np.random.RandomState

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATE = "a photo of the digit {}"
SIZE = 32


def digits4(seed: int = 0, alpha: float | None = None) -> Federation:
    """Return four sites with 449 or 450 handwritten digits each, 32x32 RGB.

    Each original is at one site and in one split. Of ten successive images of a class, five are training, one validation and
    four test images (225 / 45 / 179 or 180 per site).

    Args:
        seed: seed of the partition and the styles, not of a training; with the default all runs have the same data.
        alpha: label skew: each class is partitioned by Dirichlet(alpha) shares (0.1 strong, 10 weak); None: no skew.

    Raises:
        InputError: if alpha is not above 0.
    """
    check_seed(seed, "the seed of digits4")
    labels, strokes = _originals()
    styles = {"ink": _ink, "paper": _paper, "street": _street, "texture": _texture}
    key = ("digits4", seed)
    parts = iid(labels, len(styles), key=key) if alpha is None else dirichlet(labels, len(styles), alpha, key=key)
    sites = {}
    for (name, style), part in zip(styles.items(), parts, strict=True):
        images = style(strokes[part], random_state(*key, name))
        turn = np.arange(len(part)) % 10
        rows = {"train": turn % 2 == 0, "validation": turn == 5, "test": (turn % 2 == 1) & (turn != 5)}
        sites[name] = Site(**{split: _table(images[mask], labels[part[mask]]) for split, mask in rows.items()})
    options = [f"seed={seed}"] * (seed != 0) + ([f"alpha={alpha:g}"] if alpha is not None else [])
    return Federation("digits4" + (f"({', '.join(options)})" if options else ""), CLASSES, TEMPLATE, sites)


def _table(images: Ints, labels: Ints) -> dict[str, torch.Tensor]:
    pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.uint8)
    return {"image": torch.from_numpy(pixels), "label": torch.from_numpy(labels.astype(np.int64))}


def _originals() -> tuple[Ints, Ints]:
    """Return labels [1797] and strokes [1797, 32, 32], the ink of each pixel from 0 to 255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    margin = np.pad(digits.images.astype(np.int64) * 255 // 16, ((0, 0), (1, 1), (1, 1)))
    large = [
        Image.fromarray(image.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(0.5, 0.5, 9.5, 9.5))
        for image in margin
    ]
    # a pen's edge is steeper than that of the interpolation
    strokes = np.clip((np.stack([np.asarray(image) for image in large]).astype(np.int64) - 64) * 2, 0, 255)
    return digits.target.astype(np.int64), strokes


def _between(random: Random, low: int, high: int, *shape: int) -> Ints:
    """Return whole numbers from low to high, both included."""
    return low + np.floor(random.random_sample(shape) * (high - low + 1)).astype(np.int64)


def _grain(random: Random, *shape: int) -> Ints:
    """Return nearly normal noise, mean 0 and standard deviation 256.

    It is a sum of four bytes, since the last bit of a logarithm depends on the machine.
    """
    count = int(np.prod(shape))
    total = np.frombuffer(random.bytes(4 * count), dtype=np.uint8).reshape(4, *shape).sum(axis=0, dtype=np.int64)
    return (total - 510) * 256 // 148


def _slope(random: Random, count: int, most: int) -> Ints:
    """Return planes [count, 32, 32, 1] with random tilt, from -most to most at the borders."""
    tilt = _between(random, -most, most, 2, count, 1, 1, 1)
    ramp = 2 * np.arange(SIZE) - (SIZE - 1)
    return (tilt[0] * ramp[:, None, None] + tilt[1] * ramp[None, :, None]) // (2 * SIZE)


def _mix(ground: Ints, ink: Ints, cover: Ints) -> Ints:
    """Return ink over ground, both [n, 32 or 1, 32 or 1, 3]; cover [n, 32, 32] is from 0 (ground) to 255 (ink)."""
    return (ground * (255 - cover[..., None]) + ink * cover[..., None]) // 255


def _ink(strokes: Ints, random: Random) -> Ints:
    """Return white digits on black."""
    return np.repeat(strokes[..., None], 3, axis=3)


def _paper(strokes: Ints, random: Random) -> Ints:
    """Return dark ink on light, slightly uneven paper."""
    count = len(strokes)
    sheet = _between(random, 205, 240, count, 1, 1, 1) - _between(random, 0, 6, count, 1, 1, 3) * np.array([0, 1, 4])
    uneven = _slope(random, count, 24) + _grain(random, count, SIZE, SIZE, 1) * 4 // 256
    ink = _between(random, 10, 70, count, 1, 1, 1) + _between(random, 0, 20, count, 1, 1, 3) * np.array([0, 1, 3])
    opacity = _between(random, 190, 250, count, 1, 1)
    return np.clip(_mix(sheet + uneven, ink, strokes * opacity // 255), 0, 255)


def _texture(strokes: Ints, random: Random) -> Ints:
    """Return strokes blended into crops of photographs: light on darkened dark crops, dark on lightened light crops."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    count = len(strokes)
    crops = []
    for which, scale, across, down in random.random_sample((count, 4)):
        photograph = photographs[int(which * len(photographs))]
        side = int(32 + scale * scale * 200)
        left, top = int(across * (photograph.width - side)), int(down * (photograph.height - side))
        crop = photograph.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        crops.append(np.asarray(crop, dtype=np.int64))
    ground = np.stack(crops)
    light = ground.sum(axis=(1, 2, 3), keepdims=True) < 128 * 3 * SIZE * SIZE
    tint = _between(random, 0, 60, count, 1, 1, 3)
    ink = np.where(light, 255 - tint, tint)
    ground = np.where(light, ground * 180 // 256, 255 - (255 - ground) * 180 // 256)
    opacity = _between(random, 190, 240, count, 1, 1)
    return _mix(ground, ink, strokes * opacity // 255)


def _street(strokes: Ints, random: Random) -> Ints:
    """Return coloured, blurred, noisy, slightly rotated and unevenly lit digits, similar to house numbers."""
    count = len(strokes)
    ground, ink = _colours(random, count)
    cover = _blurred(_turned(strokes, random), _between(random, 0, 2, count))
    light = _slope(random, count, 40) + _grain(random, count, SIZE, SIZE, 3) * _between(random, 3, 12, count, 1, 1, 1) // 256
    return np.clip(_mix(ground, ink, cover) + light, 0, 255)


def _colours(random: Random, count: int) -> tuple[Ints, Ints]:
    """Return ground and ink, each [count, 1, 1, 3]: two random colours whose brightness differs by 110 to 170 (of 255).

    The difference is smaller if a channel saturates. The ink is the darker colour in 15 of 100 images.
    """
    bright = np.array([77, 151, 28])  # ITU-R BT.601 luma in 256ths
    pair = _between(random, 0, 255, 2, count, 3)
    middle, gap = _between(random, 100, 155, count), _between(random, 110, 170, count)
    gap = np.where(random.random_sample(count) < 0.15, -gap, gap)
    wanted = np.stack([middle - gap // 2, middle + gap // 2])
    ground, ink = np.clip(pair + (wanted - (pair * bright).sum(axis=2) // 256)[..., None], 0, 255)
    return ground[:, None, None], ink[:, None, None]


def _turned(strokes: Ints, random: Random) -> Ints:
    """Return each image rotated by up to 10°, shrunk by up to 15 % and shifted by up to 2 pixels.

    Interpolation is bilinear, in 256ths of a pixel.
    """
    count = len(strokes)
    tangent = _between(random, -45, 45, count, 1, 1)
    shift = _between(random, -512, 512, 2, count, 1, 1)
    zoom = _between(random, 256, 300, count, 1, 1)
    grid = 2 * np.arange(SIZE) - (SIZE - 1)
    down, across = grid[:, None] * 128, grid[None, :] * 128
    rows = ((down + tangent * across // 256) * zoom // 256) + shift[0] + 128 * (SIZE - 1)
    columns = ((across - tangent * down // 256) * zoom // 256) + shift[1] + 128 * (SIZE - 1)
    framed = np.pad(strokes, ((0, 0), (1, 1), (1, 1)))
    rows, columns = np.clip(rows + 256, 0, 256 * (SIZE + 1) - 1), np.clip(columns + 256, 0, 256 * (SIZE + 1) - 1)
    y, x, image = rows // 256, columns // 256, np.arange(count)[:, None, None]
    fy, fx = rows % 256, columns % 256
    upper = framed[image, y, x] * (256 - fx) + framed[image, y, x + 1] * fx
    lower = framed[image, y + 1, x] * (256 - fx) + framed[image, y + 1, x + 1] * fx
    return (upper * (256 - fy) + lower * fy) // 65536


def _blurred(strokes: Ints, passes: Ints) -> Ints:
    """Return each image [32, 32] after `passes` smoothings by (1, 2, 1) along both axes."""
    for turn in range(int(passes.max())):
        framed = np.pad(strokes, ((0, 0), (1, 1), (1, 1)), mode="edge")
        tall = framed[:, :-2] + 2 * framed[:, 1:-1] + framed[:, 2:]
        smooth = (tall[:, :, :-2] + 2 * tall[:, :, 1:-1] + tall[:, :, 2:]) // 16
        strokes = np.where((passes > turn)[:, None, None], smooth, strokes)
    return strokes
