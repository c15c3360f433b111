"""Rendered digits: reproducible, of the right classes, and legible."""

import pytest
import torch

from warmfed.core.rng import stream
from warmfed.data.rendered_digits import FONTS, blurred, characters, glyphs, looks, rendered, spline


def test_the_generator_names_the_images() -> None:
    one, again, other = (rendered(20, stream("rendered", seed)) for seed in (1, 1, 2))
    assert one["image"].equal(again["image"])
    assert one["label"].equal(again["label"])
    assert not one["image"].equal(other["image"])


def test_as_many_of_each_class_in_random_order() -> None:
    table = rendered(30, stream("rendered"))
    assert table["image"].shape == (30, 3, 32, 32)
    assert table["image"].dtype == torch.uint8
    assert table["label"].bincount().tolist() == [3] * 10
    assert table["label"].tolist() != sorted(table["label"].tolist())


def test_only_the_classes_asked_for() -> None:
    assert set(rendered(12, stream("rendered"), classes=(3, 7))["label"].tolist()) == {3, 7}


def test_every_font_has_every_digit() -> None:
    bank = glyphs()
    assert bank.distance.shape[:2] == (len(FONTS), 10)
    assert bank.distance.amax((2, 3)).min() > 0.02  # somewhere inside a stroke
    assert (bank.distance > 0).flatten(2).float().mean(2).max() < 0.2  # and never a filled box
    assert bank.stem.min() > 0.02
    assert bank.stem.max() < 0.15


@pytest.mark.parametrize(("at", "weights"), [(0, [1, 0, 0, 0]), (2, [0, 0, 1, 0]), (1.5, [-1 / 16, 9 / 16, 9 / 16, -1 / 16])])
def test_catmull_rom_weights(at: float, weights: list[float]) -> None:
    assert spline(4, at).tolist() == pytest.approx(weights)


def test_characters_are_drawn_and_an_eight_takes_more_ink_than_a_one() -> None:
    ink = characters(torch.tensor([1, 8]).repeat(64), stream("ink"))
    assert ink.shape == (128, 1, 32, 32)
    assert ink.min() >= 0
    assert ink.max() <= 1
    assert (ink.amax((1, 2, 3)) > 0.5).float().mean() > 0.95
    ones, eights = ink.mean((1, 2, 3)).view(64, 2).mean(0)
    assert eights > 1.3 * ones


def test_the_character_differs_from_its_ground() -> None:
    ink = torch.zeros(100, 1, 32, 32)
    ink[:, :, 8:24, 8:24] = 1
    image = looks(ink, stream("looks"))
    inside, outside = image[:, :, 10:22, 10:22].mean((2, 3)), image[:, :, :6].mean((2, 3))
    assert ((inside - outside).abs().amax(1) > 0.1).float().mean() > 0.9


def test_blur_keeps_what_is_flat_and_softens_an_edge() -> None:
    flat = torch.full((2, 3, 32, 32), 0.3)
    assert blurred(flat, torch.tensor([[0.0], [1.5]])).sub(0.3).abs().max() < 1e-6
    edge = torch.zeros(2, 1, 32, 32)
    edge[..., 16:] = 1
    sharp, soft = blurred(edge, torch.tensor([[0.0], [1.5]]))
    assert sharp.equal(edge[0])
    assert 0.3 < soft[0, 16, 15] < 0.5
