"""Pen paths of the ten digits, as smooth curves that are linear in their control points."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

PATHS: dict[int, tuple[str, ...]] = {
    0: (
        "50 0, 16 16, 4 55, 24 95, 60 98, 92 62, 86 20, 50 0",
        "70 6, 30 6, 5 45, 20 92, 62 97, 95 50, 75 8, 42 10",
        "40 4, 10 40, 20 92, 55 98, 88 70, 85 25, 55 2",
    ),
    1: (
        "50 0, 50 50, 50 100",
        "22 30, 55 0, 55 50, 55 100",
        "20 25, 52 0, 52 50, 52 100; 20 100, 85 100",
        "10 42, 40 22, 62 0, 60 50, 55 100",
    ),
    2: (
        "8 25, 30 2, 75 8, 82 35, 45 72, 5 100; 5 100, 50 98, 98 98",
        "10 22, 45 0, 85 20, 68 55, 30 90, 8 90, 20 76, 50 92, 95 95",
        "15 12, 55 0, 88 25, 60 65, 10 97; 10 97, 50 90, 95 100",
    ),
    3: (
        "10 12, 50 0, 85 18, 72 42, 38 48; 38 48, 80 55, 90 80, 50 100, 6 88",
        "10 4, 85 2; 85 2, 45 40; 45 40, 88 56, 85 86, 45 100, 8 90",
        "15 8, 60 0, 82 20, 50 46, 86 62, 78 92, 40 100, 10 92",
    ),
    4: (
        "25 0, 14 30, 6 60; 6 60, 50 60, 96 56; 70 25, 68 60, 64 100",
        "68 0, 35 35, 2 68; 2 68, 98 68; 68 0, 68 50, 68 100",
        "10 2, 8 30, 20 52, 80 46; 85 0, 82 50, 78 100",
        "50 0, 25 35, 5 60; 5 60, 95 62; 62 35, 55 100",
    ),
    5: (
        "88 2, 20 3; 20 3, 14 42; 14 42, 55 36, 90 60, 72 94, 35 100, 5 88",
        "90 4, 50 2, 25 8, 20 42, 60 45, 85 70, 55 98, 8 92",
        "30 3, 24 42; 24 42, 65 44, 82 70, 60 96, 12 98; 30 3, 90 0",
    ),
    6: (
        "70 0, 35 25, 10 65, 30 97, 72 95, 85 70, 55 52, 15 70",
        "85 6, 40 10, 10 55, 25 95, 70 97, 88 68, 60 48, 15 62",
        "40 0, 18 40, 12 80, 45 100, 80 80, 55 58, 20 75",
    ),
    7: (
        "5 4, 50 4, 92 2; 92 2, 60 45, 40 100",
        "5 6, 90 3; 90 3, 62 50, 45 100; 25 52, 90 48",
        "6 18, 12 2, 50 6, 95 0; 95 0, 55 50, 30 100",
        "10 10, 40 0, 75 8, 78 30, 60 65, 50 100; 30 58, 95 45",
    ),
    8: (
        "80 12, 45 0, 15 20, 50 47, 86 76, 50 100, 12 78, 48 48, 82 20, 68 5",
        "50 0, 18 12, 22 38, 50 46, 80 36, 80 10, 50 0; 50 46, 10 64, 18 94, 52 100, 90 88, 86 58, 50 46",
        "55 2, 25 20, 60 52, 75 82, 45 100, 25 80, 50 50, 80 22, 55 2",
    ),
    9: (
        "82 25, 50 0, 15 20, 25 48, 60 46, 84 20; 84 12, 82 55, 78 100",
        "85 20, 50 0, 12 22, 30 50, 70 42, 85 15, 88 55, 70 92, 40 100, 12 90",
        "80 10, 40 2, 15 28, 45 50, 80 28, 80 10; 80 10, 72 55, 45 100",
        "75 30, 45 45, 20 25, 50 2, 80 15, 75 60, 50 98",
    ),
}
"""By digit, alternatives of strokes ("; ") of control points (", ") x y, in hundredths of a square, y pointing down."""

SEGMENTS = 36
"""Straight pieces of a path."""


class Pens(NamedTuple):
    """All `PATHS` as linear maps from control points to the pieces' ends (Catmull-Rom splines are linear in them)."""

    points: Tensor  # [paths, controls, 2], centred
    basis: Tensor  # [paths, 2, SEGMENTS, controls]: first and last end of each piece
    first: Tensor  # [digits]: where a digit's paths begin
    paths: Tensor  # [digits]: how many a digit has


def parsed(path: str) -> list[list[tuple[float, float]]]:
    """The strokes of a path, as points (x, y) in a unit square."""
    strokes = [[point.split() for point in stroke.split(", ")] for stroke in path.split("; ")]
    return [[(int(x) / 100, int(y) / 100) for x, y in stroke] for stroke in strokes]


@cache
def pens() -> Pens:
    """The pen paths as tensors."""
    paths = [parsed(path) for alternatives in PATHS.values() for path in alternatives]
    controls = max(sum(map(len, path)) for path in paths)
    points = torch.zeros(len(paths), controls, 2)
    basis = torch.zeros(len(paths), 2, SEGMENTS, controls)
    for row, path in enumerate(paths):
        spans = sum(len(stroke) - 1 for stroke in path)
        start, piece = 0, 0
        for index, stroke in enumerate(path):
            points[row, start : start + len(stroke)] = torch.tensor(stroke) - 0.5
            last = index == len(path) - 1
            pieces = SEGMENTS - piece if last else round(SEGMENTS * (len(stroke) - 1) / spans)
            weights = torch.stack([spline(len(stroke), step * (len(stroke) - 1) / pieces) for step in range(pieces + 1)])
            basis[row, 0, piece : piece + pieces, start : start + len(stroke)] = weights[:-1]
            basis[row, 1, piece : piece + pieces, start : start + len(stroke)] = weights[1:]
            start, piece = start + len(stroke), piece + pieces
    count = torch.tensor([len(alternatives) for alternatives in PATHS.values()])
    return Pens(points, basis, count.cumsum(0) - count, count)


def spline(count: int, at: float) -> Tensor:
    """Weights of `count` control points at position `at` (0 to count - 1) of their Catmull-Rom spline."""
    left = min(int(at), count - 2)
    t = at - left
    cubic = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3)
    weights = torch.zeros(count)
    for offset, weight in enumerate(cubic):
        weights[min(max(left - 1 + offset, 0), count - 1)] += weight / 2
    return weights
