"""Rendered digits: the public data behind the embedded base and the public classifier.

The images contain no person's handwriting. Each character is a glyph of a font that matplotlib ships. It is rotated, sheared
and bent, and a smooth field changes the width of its strokes, so that it resembles handwriting. The ground is flat, shaded
or textured, in random colours; the image is blurred and noisy.

All random numbers come from the generator that is passed in, so (count, generator, classes) determines every byte.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

SIDE = 32
"""Height and width of a rendered image in pixels."""

DIGITS = tuple(range(10))

FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Oblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmb10", "cmr10", "cmss10", "cmti10", "cmtt10",
)  # fmt: skip
"""Fonts of matplotlib with all ten digits in the usual shape (cmmi10 has old-style digits, cmex10 has none)."""


class Glyphs(NamedTuple):
    """Signed distances (positive inside) in units of the character's height, on a square of two heights."""

    distance: Tensor  # [fonts, digits, side, side]
    stem: Tensor  # [fonts, digits]: half the width of a typical stroke


@cache
def glyphs(side: int = 96) -> Glyphs:
    """Return the distance fields of all `FONTS`. Pillow draws them in about three seconds, once per process."""
    from pathlib import Path

    import matplotlib
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont
    from scipy.ndimage import distance_transform_edt, maximum_filter

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    height = 4 * side // 2  # rendered at four times the final resolution
    distance = np.zeros((len(FONTS), 10, side, side), np.float32)
    stem = np.zeros((len(FONTS), 10), np.float32)
    for row, name in enumerate(FONTS):
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 256)
        for digit in DIGITS:
            left, top, right, bottom = font.getbbox(str(digit))
            drawn = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8))
            ImageDraw.Draw(drawn).text((4 - left, 4 - top), str(digit), fill=255, font=font)
            drawn = drawn.crop(drawn.getbbox())
            width = max(1, round(drawn.width * height / drawn.height))
            drawn = drawn.resize((width, height), Image.Resampling.BICUBIC)
            square = Image.new("L", (2 * height, 2 * height))
            square.paste(drawn, (height - width // 2, height // 2))
            ink = np.asarray(square) > 127
            signed = -distance_transform_edt(~ink)
            near = np.s_[height // 2 - 1 : -height // 2 + 1, height - width // 2 - 1 : height + width - width // 2 + 1]
            inside = distance_transform_edt(ink[near])
            signed[near] += inside
            ridge = inside[(inside == maximum_filter(inside, 5)) & (inside > 1)]
            distance[row, digit] = (signed / height).reshape(side, 4, side, 4).mean((1, 3))
            stem[row, digit] = np.median(ridge) / height
    return Glyphs(torch.from_numpy(distance), torch.from_numpy(stem))


def spline(count: int, at: float) -> Tensor:
    """Return the weights of `count` control points at position `at` (0 to count - 1) of their Catmull-Rom spline."""
    left = min(int(at), count - 2)
    t = at - left
    cubic = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3)
    weights = torch.zeros(count)
    for offset, weight in enumerate(cubic):
        weights[min(max(left - 1 + offset, 0), count - 1)] += weight / 2
    return weights


@cache
def enlarging(cells: int) -> Tensor:
    """Return the weights [SIDE, cells + 3] of a smooth curve through `cells` cells and their neighbours."""
    positions = 1 + (torch.arange(SIDE) + 0.5) * cells / SIDE
    return torch.stack([spline(cells + 3, float(position)) for position in positions])


class Draw:
    """Random numbers of shape [n, 1, 1, ...] from one generator."""

    def __init__(self, count: int, rng: Generator) -> None:
        self.count, self.rng = count, rng

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(self.count, *(shape or (1,)), generator=self.rng) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.count, *(shape or (1,)), generator=self.rng)

    def chance(self, share: float, *shape: int) -> Tensor:
        return (self.uniform(0, 1, *shape) < share).float()

    def integers(self, high: int | Tensor) -> Tensor:
        return (torch.rand(self.count, generator=self.rng) * high).long()

    def smooth(self, cells: int, channels: int = 1) -> Tensor:
        """Return smooth noise with unit variance at the cells, [n, channels, SIDE, SIDE]."""
        up = enlarging(cells)
        return up @ self.normal(channels, cells + 3, cells + 3) @ up.T


def characters(label: Tensor, rng: Generator) -> Tensor:
    """Return the ink of one character per label, [n, 1, SIDE, SIDE] in [0, 1]."""
    draw = Draw(len(label), rng)
    # forward map from the unit character to pixels around the centre
    # mostly centred and upright: a small denoiser learns the shape of a class only if its images overlap
    height = SIDE * draw.uniform(0.76, 0.98)
    wide = draw.uniform(0.7, 1.15)
    turn, shear = 0.1 * draw.normal(), 0.15 * draw.normal()
    cosine, sine = turn.cos(), turn.sin()
    squeeze = torch.stack((torch.cat((wide, shear), 1), torch.cat((0 * wide, 1 + 0 * wide), 1)), 1)
    rotation = torch.stack((torch.cat((cosine, -sine), 1), torch.cat((sine, cosine), 1)), 1)
    forward = height[:, :, None] * rotation @ squeeze  # [n, 2, 2]
    room = (SIDE - height) / 4
    centre = torch.cat((draw.uniform(-1, 1) * (room + 1), draw.uniform(-1, 1) * room), 1)  # [n, 2]
    ticks = torch.arange(SIDE) - (SIDE - 1) / 2
    grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1)  # [SIDE, SIDE, 2] as (x, y)
    bend = draw.smooth(3, 2) * draw.uniform(0, 1.6, 1, 1, 1)
    grid = grid + bend.permute(0, 2, 3, 1) - centre[:, None, None]

    ink = font_shapes(label, forward, grid, draw)[:, None]
    gaps = torch.sigmoid(5 * (draw.smooth(6) + draw.uniform(0.6, 1.6, 1, 1, 1)))
    ink = torch.where(draw.chance(0.1, 1, 1, 1) > 0, ink * gaps, ink)
    return resolution(ink, draw)


def font_shapes(label: Tensor, forward: Tensor, grid: Tensor, draw: Draw) -> Tensor:
    """Return glyphs with strokes thinned or thickened by a smooth field, [n, SIDE, SIDE]."""
    bank = glyphs()
    font = draw.integers(len(FONTS))
    inverse = torch.linalg.inv(forward)
    where = torch.einsum("nij,nhwj->nhwi", inverse, grid)  # units of the height; the field spans [-1, 1]
    distance = F.grid_sample(bank.distance[font, label][:, None], where, padding_mode="border", align_corners=False)
    scale = torch.linalg.det(forward).abs().sqrt()[:, None, None, None]
    stem = bank.stem[font, label][:, None, None, None] * scale
    target = draw.uniform(0.9, 3.2, 1, 1, 1)
    change = (target - stem).maximum(-0.6 * stem).clamp(-2.5, 1.3)
    field = draw.uniform(0, 0.45, 1, 1, 1) * target * draw.smooth(3)
    depth = distance * scale + change + field.maximum(-0.6 * (stem + change))
    return torch.sigmoid(depth / draw.uniform(0.22, 0.6, 1, 1, 1))[:, 0]


def resolution(ink: Tensor, draw: Draw) -> Tensor:
    """Return the ink with less detail in half of the characters: scaled to 8 to 16 pixels and back, at full strength."""
    kind = draw.integers(10)
    for index, (cells, mode) in enumerate(
        ((8, "bilinear"), (8, "bicubic"), (8, "bilinear"), (11, "bicubic"), (16, "bilinear"))
    ):
        rows = kind == index
        small = F.adaptive_avg_pool2d(ink[rows], cells)
        small = (small * 16).round() / 16 if index < 3 else small
        ink[rows] = F.interpolate(small, size=(SIDE, SIDE), mode=mode, align_corners=False).clamp(0, 1)
    floor = draw.uniform(0, 0.25, 1, 1, 1)
    gain = draw.uniform(1, 1.7, 1, 1, 1) / (ink.amax((2, 3), keepdim=True) - floor).clamp_min(0.2)
    return ((ink - floor) * gain).clamp(0, 1)


def noise(draw: Draw) -> Tensor:
    """Return multi-octave noise with a random spectrum, mostly grey or tinted, [n, 3, SIDE, SIDE] of about unit range."""
    slope = draw.uniform(0.2, 1.1, 1, 1, 1)
    colour = draw.uniform(0, 0.8, 1, 1, 1)
    total = torch.zeros(draw.count, 3, SIDE, SIDE)
    for octave, cells in enumerate((1, 2, 4, 8, 16)):
        total += torch.exp(-slope * octave) * (draw.smooth(cells) + colour * draw.smooth(cells, 3))
    return total / total.std((1, 2, 3), keepdim=True).clamp_min(1e-3)


def pattern(draw: Draw) -> Tensor:
    """Return stripes, checks or spots, [n, 1, SIDE, SIDE] in [-1, 1]."""
    ticks = torch.linspace(-1, 1, SIDE)
    y, x = ticks[:, None], ticks[None, :]
    angle, tempo = draw.uniform(0, math.pi, 1, 1), draw.uniform(2, 14, 1, 1)
    bend = 0.6 * draw.uniform(0, 1, 1, 1) * draw.smooth(2)[:, 0]
    u = x * angle.cos() + y * angle.sin() + bend
    v = -x * angle.sin() + y * angle.cos() + bend
    stripes = torch.sin(tempo * u + 6 * draw.uniform(0, 1, 1, 1))
    checks = stripes * torch.sin(tempo * v * draw.uniform(0.5, 1.5, 1, 1) + 6 * draw.uniform(0, 1, 1, 1))
    spots = draw.smooth(6)[:, 0]
    kind = draw.integers(3)[:, None, None]
    wave = torch.where(kind == 0, stripes, torch.where(kind == 1, checks, spots))
    return torch.tanh(wave * draw.uniform(0.8, 6, 1, 1))[:, None]


def textures(draw: Draw) -> Tensor:
    """Return grounds with statistics similar to photographs, [n, 3, SIDE, SIDE] of about [0, 1].

    They are overlapping coloured regions with noise, patterns and shading.
    """
    ground = draw.uniform(0, 1, 3, 1, 1) + draw.uniform(0.0, 0.25, 1, 1, 1) * noise(draw)
    for cells in (1, 2, 3):
        edge = torch.sigmoid(draw.uniform(3, 40, 1, 1, 1) * (draw.smooth(cells) - draw.uniform(-0.3, 1.3, 1, 1, 1)))
        grain = draw.uniform(0, 0.2, 1, 1, 1) * noise(draw)
        region = draw.uniform(0, 1, 3, 1, 1) + grain
        region = region + draw.chance(0.35, 1, 1, 1) * draw.uniform(0, 0.3, 1, 1, 1) * pattern(draw)
        ground = ground + edge * draw.chance(0.7, 1, 1, 1) * (region - ground)
    grey = ground.mean(1, keepdim=True)
    ground = grey + draw.uniform(0.1, 1.0, 1, 1, 1) * (ground - grey)
    middle = ground.mean((1, 2, 3), keepdim=True)
    return middle + draw.uniform(0.4, 1.3, 1, 1, 1) * (ground - middle)


def shading(draw: Draw) -> Tensor:
    """Return a smooth change of brightness across the image, [n, 1, SIDE, SIDE] of about [-1, 1]."""
    ticks = torch.linspace(-1, 1, SIDE)
    angle = draw.uniform(0, 2 * math.pi, 1, 1, 1)
    return ticks[None, :] * angle.cos() + ticks[:, None] * angle.sin() + 0.5 * draw.smooth(1)


def blurred(image: Tensor, amount: Tensor) -> Tensor:
    """Return each image blurred by its own `amount`, [n, 1]: standard deviation of a Gaussian in pixels, up to 2."""
    n, channels = image.shape[:2]
    taps = torch.arange(-4, 5).float()
    kernel = torch.exp(-0.5 * (taps / amount.clamp_min(0.05)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = F.pad(image.reshape(1, n * channels, SIDE, SIDE), (4, 4, 4, 4), mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=n * channels)
    return F.conv2d(flat, kernel[:, None, None, :], groups=n * channels).view_as(image)


def looks(ink: Tensor, rng: Generator) -> Tensor:
    """Return images [n, 3, SIDE, SIDE] in [0, 1] of the characters with this ink."""
    draw = Draw(len(ink), rng)
    kind = draw.uniform(0, 1, 1, 1, 1)
    plain, textured = kind < 0.4, kind > 0.72  # in between: coloured, shaded, blurred, noisy

    # colours: the character's brightness is at least 0.4 (textured: 0.45) away from the ground's
    ground = draw.uniform(0, 1, 3, 1, 1)
    dark = draw.chance(0.5, 1, 1, 1)
    near = draw.uniform(0, 0.12, 1, 1, 1) * draw.uniform(0.8, 1.2, 3, 1, 1)
    ground = torch.where(plain, torch.where(dark > 0, near * draw.chance(0.6, 1, 1, 1), 1 - 2.2 * near), ground)
    ground = ground + draw.uniform(0, 0.3, 1, 1, 1) * draw.chance(0.4, 1, 1, 1) * shading(draw)
    ground = ground + draw.chance(0.5, 1, 1, 1) * draw.uniform(0, 0.08, 1, 1, 1) * noise(draw)
    ground = torch.where(textured, textures(draw), ground).clamp(0, 1)
    weight = torch.tensor((0.3, 0.59, 0.11)).view(3, 1, 1)
    behind = (weight * ground).sum(1, keepdim=True)
    behind = (behind * ink).sum((2, 3), keepdim=True) / ink.sum((2, 3), keepdim=True).clamp_min(1)
    contrast = torch.where(textured, draw.uniform(0.45, 0.95, 1, 1, 1), draw.uniform(0.4, 0.95, 1, 1, 1))
    contrast = torch.where(plain, draw.uniform(0.55, 1.1, 1, 1, 1), contrast)
    up = torch.where(behind > 0.7, -1.0, torch.where(behind < 0.3, 1.0, 1 - 2 * draw.chance(0.5, 1, 1, 1)))
    bright = (behind + up * contrast).clamp(0, 1)
    tint = torch.where(plain, draw.uniform(0, 0.15, 1, 1, 1), draw.uniform(0, 0.7, 1, 1, 1)) * draw.uniform(-1, 1, 3, 1, 1)
    stroke = (bright + tint - (weight * tint).sum(1, keepdim=True)).clamp(0, 1)
    grain = draw.chance(0.4, 1, 1, 1) * draw.uniform(0, 0.15, 1, 1, 1)
    stroke = (stroke + grain * noise(draw)).clamp(0, 1)

    strength = torch.where(textured, draw.uniform(0.7, 1, 1, 1, 1), draw.uniform(0.85, 1, 1, 1, 1))
    image = ground + strength * ink * (stroke - ground)
    inverted = (ground - ink * strength).abs()
    image = torch.where(textured & (draw.chance(0.15, 1, 1, 1) > 0), inverted, image)

    light = 1 + draw.chance(0.3, 1, 1, 1) * draw.uniform(0, 0.35, 1, 1, 1) * shading(draw)
    image = image * torch.where(plain, torch.ones(()), light)
    soft = draw.chance(0.5) * draw.uniform(0.3, 1.3)
    image = blurred(image, torch.where(plain[..., 0, 0], 0.4 * soft, soft))
    level = draw.chance(0.5, 1, 1, 1) * draw.uniform(0, 0.09, 1, 1, 1)
    image = image + torch.where(plain, 0.3 * level, level) * draw.normal(3, SIDE, SIDE)
    return image.clamp(0, 1)


def rendered(count: int, rng: Generator, classes: Sequence[int] = DIGITS, batch: int = 64) -> dict[str, Tensor]:
    """Return a table of `count` rendered digits in random order; class counts differ by one at most.

    Args:
        count: number of images; one core renders about 2,000 per second.
        rng: source of all random numbers; the same state gives the same bytes.
        classes: the digits to render; an image's label is the digit itself.
        batch: number of images rendered together; another value gives other images.

    Returns:
        `{"image": uint8 [count, 3, 32, 32], "label": int64 [count]}`.
    """
    label = torch.tensor(classes)[torch.arange(count) % len(classes)]
    label = label[torch.randperm(count, generator=rng)]
    image = torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8)
    for start in range(0, count, batch):
        part = slice(start, start + batch)
        image[part] = (looks(characters(label[part], rng), rng) * 255).round().to(torch.uint8)
    return {"image": image, "label": label}
