"""Pictures of 16 and more bits, and pictures of several frames."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import pets, refused
from PIL import Image

from warmfed.data import load
from warmfed.data.image_io import UnreadableError, picture, quiet


def grey(values: Sequence[int], mode: str = "I;16") -> bytes:
    kind = {"I;16": np.uint16, "I": np.int32}[mode]
    buffer = io.BytesIO()
    Image.fromarray(np.array(values, kind).reshape(1, -1).repeat(len(values), 0)).save(buffer, "TIFF")
    return buffer.getvalue()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=6), st.integers(0, 65535))
def test_values_keep_their_order_and_the_largest_is_white(values: list[int], max_value: int) -> None:
    with quiet():
        if max(values) > (max_value or 65535):
            with pytest.raises(UnreadableError, match="to the largest value"):
                picture(grey(values), len(values), 1, max_value)
            return
        pixels, facts = picture(grey(values), len(values), 1, max_value)
    assert facts.deep == max(values) + 1
    expected = [round(value * 255 / max_value + 1e-9) if max_value else value >> 8 for value in values]
    assert np.abs(pixels[0, 0].astype(int) - expected).max() <= (1 if max_value else 0)


@pytest.mark.parametrize("values", [[-1, 0], [0, 65536], [-1000, 2000], [0, 2**31 - 1]])
def test_32_bit_values_beyond_16_bits_are_refused(values: list[int]) -> None:
    with quiet(), pytest.raises(UnreadableError, match=f"pixel values from {min(values)} to {max(values)}"):
        picture(grey(values, "I"), 2, 1)


def folder(root: Path, most: int) -> Path:
    random = np.random.default_rng(0)
    for site in "ab":
        for name in ("cat", "dog"):
            (root / site / name).mkdir(parents=True)
            for i in range(10):
                pixels = random.integers(0, most, (8, 8), dtype=np.uint16)
                Image.fromarray(pixels).save(root / site / name / f"{i}.png")
    return root


def test_a_scan_of_12_bits_is_noted_and_can_be_brightened(tmp_path: Path) -> None:
    root = folder(tmp_path, 4096)
    told = [note for note in load("folder", str(root), image_size=8).notes if "16-bit" in note]
    assert len(told) == 2
    assert "set data.options.max_value=4095" in told[0]
    bright = load("folder", str(root), image_size=8, max_value=4095)
    assert not bright.notes
    assert bright.sites["a"].train["image"].max() > 250


def test_black_pictures_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, 200)
    refused(lambda: load("folder", str(root), image_size=8), "they would be black; set data.options.max_value")
    refused(lambda: load("folder", str(root), image_size=8, max_value=100), "has pixel values from")


def test_a_small_file_that_declares_a_huge_picture_is_refused() -> None:
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    with quiet(), pytest.raises(UnreadableError, match="declares 9,000×9,000 pixels in"):
        picture(buffer.getvalue(), 8, 3)


def test_frames_and_masks_are_noted(tmp_path: Path) -> None:
    root = pets(tmp_path)
    pages = [Image.new("L", (8, 8), shade) for shade in (40, 90)]
    pages[0].save(root / "home" / "cat" / "pages.tif", save_all=True, append_images=pages[1:])
    pages[0].save(root / "home" / "dog" / "moving.webp", save_all=True, append_images=pages[1:], lossless=True)
    for i, path in enumerate(sorted((root / "shelter").rglob("*.png"))):
        pixels = np.zeros((8, 8), np.uint8)
        pixels[i % 8, i // 8] = 3
        Image.fromarray(pixels).save(path)
    notes = " ".join(load("folder", str(root), image_size=8).notes)
    assert "of 2 pictures with several frames or pages the first one is used, home/cat/pages.tif among them" in notes
    assert "no pixel of site 'shelter' is above 3 of 255: its images look black" in notes
