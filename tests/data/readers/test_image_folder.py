"""Readers of folders, arrays and files: accepted data, and errors of one line."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import pets, picture, refused, sizes
from PIL import Image

from warmfed.data import arrays, folder, load, npz, save_partition
from warmfed.utils.errors import InputError

# Folders


def test_a_folder_becomes_a_federation(tmp_path: Path) -> None:
    federation = folder(pets(tmp_path / "pets"), image_size=8)
    assert federation.name == "pets"
    assert federation.classes == ("cat", "dog")
    assert federation.prompts == ("a photo of a cat", "a photo of a dog")
    assert sizes(federation) == {"home": (12, 4, 4), "shelter": (12, 4, 4)}
    for site in federation.sites.values():
        for table in site.splits.values():
            assert table["label"].bincount().unique().numel() == 1  # stratified
    everything = {image.numpy().tobytes() for s in federation.sites.values() for t in s.splits.values() for image in t["image"]}
    assert picture(103).tobytes() in {
        np.frombuffer(i, np.uint8).reshape(3, 8, 8).transpose(1, 2, 0).tobytes() for i in everything
    }
    assert len(everything) == 40


def test_the_same_folder_is_the_same_data_and_the_seed_names_the_split(tmp_path: Path) -> None:
    root = pets(tmp_path)
    assert folder(root).fingerprint == load(str(root)).fingerprint == load(f"folder:{root}").fingerprint
    assert folder(root).fingerprint != folder(root, seed=1).fingerprint


def test_given_splits_are_kept_and_a_missing_one_is_taken_from_train(tmp_path: Path) -> None:
    pets(tmp_path / "home", ("train", "val", "test"))
    pets(tmp_path / "shelter", ("train", "test"), start=5000)
    federation = folder(tmp_path, image_size=8)
    assert sizes(federation) == {"home": (20, 20, 20), "shelter": (16, 4, 20)}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for site in ("road", "station"):
        for name in ("car", "train"):
            (tmp_path / site / name).mkdir(parents=True)
            for i in range(5):
                picture(hash((len(site), len(name), i)) % 2**31).save(tmp_path / site / name / f"{i}.png")
    assert folder(tmp_path).classes == ("car", "train")


def test_classes_are_the_union_and_numbers_are_sorted_by_value(tmp_path: Path) -> None:
    for site, names in {"a": ("9", "10"), "b": ("9", "2")}.items():
        for name in names:
            (tmp_path / site / name).mkdir(parents=True)
            for i in range(5):
                picture(ord(site) * 100 + int(name) * 7 + i).save(tmp_path / site / name / f"{i}.png")
    federation = folder(tmp_path)
    assert federation.classes == ("2", "9", "10")
    assert federation.notes == tuple(
        f"site {site!r} has no images of {name}; its test does not show how a model does on them"
        for site, name in (("a", "2"), ("b", "10"))
    )
    assert federation.present == {"a": ("9", "10"), "b": ("2", "9")}


def test_all_kinds_of_pictures_become_rgb(tmp_path: Path) -> None:
    pets(tmp_path)
    where = tmp_path / "home" / "cat"
    red = Image.new("RGB", (40, 20), (255, 0, 0))
    red.convert("P").save(where / "a-palette.png")
    Image.new("L", (20, 20), 7).save(where / "b-grey.bmp")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(where / "c-alpha.webp", lossless=True)
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(where / "d-cmyk.jpg", quality=100)
    Image.fromarray(np.full((20, 20), 50 * 256 + 99, np.uint16)).save(where / "e-grey16.png")
    Image.new("1", (20, 20), 1).save(where / "f-bit.png")
    Image.new("LA", (20, 20), (0, 0)).save(where / "g-grey-alpha.png")
    federation = folder(tmp_path)
    plain = {
        tuple(image[:, 0, 0].tolist())
        for table in federation.sites["home"].splits.values()
        for image in table["image"]
        if (image == image[:, :1, :1]).all()
    }
    assert plain == {(255, 0, 0), (7, 7, 7), (255, 255, 255), (50, 50, 50)}
    assert federation.notes == (
        "no 16-bit picture of site 'home' has a value above 12,899 (14 bits), so they are dark; "
        "set data.options.max_value=16383 to brighten them",
        "3 images repeat others exactly; each stays on one side of the splits",
    )


def test_exif_rotation_is_undone(tmp_path: Path) -> None:
    from warmfed.data.image_io import decode

    sketch = Image.new("L", (16, 16), 0)
    sketch.paste(255, (0, 0, 16, 8))  # light above
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the file has to be turned clockwise
    sketch.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif)
    upright = decode(tmp_path / "turned.jpg", 16)
    assert upright[:, :6].min() > 240
    assert upright[:, 10:].max() < 15


def test_large_pictures_are_read(tmp_path: Path) -> None:
    from warmfed.data.image_io import decode

    Image.new("RGB", (4000, 3000), (10, 200, 30)).save(tmp_path / "large.jpg")
    pixels = decode(tmp_path / "large.jpg", 32)
    assert pixels.shape == (3, 32, 32)
    assert np.abs(pixels.astype(int) - np.array([10, 200, 30])[:, None, None]).max() < 4


def test_pictures_beyond_all_measure_are_refused(tmp_path: Path) -> None:
    pets(tmp_path)
    path = tmp_path / "home" / "cat" / "wall.bmp"
    picture(1).save(path)
    head = path.read_bytes()
    path.write_bytes(head[:18] + struct.pack("<ii", 20_000, 10_000) + head[26:])  # width and height
    refused(lambda: folder(tmp_path), "home/cat/wall.bmp has more than 89,478,485 pixels; make it smaller")


def test_copies_never_straddle_a_split(tmp_path: Path) -> None:
    pets(tmp_path, each=20)
    for i in range(20):  # every cat of home four times, once at the other site, in another format
        for copy, suffix in enumerate(("png", "bmp", "webp")):
            picture(i).save(
                tmp_path / "home" / "cat" / f"copy{i}-{copy}.{suffix}", **({"lossless": True} if suffix == "webp" else {})
            )
        picture(i).save(tmp_path / "shelter" / "cat" / f"copy{i}.png")
    federation = folder(tmp_path, image_size=8)
    split_of: dict[bytes, set[str]] = {}
    for site in federation.sites.values():
        for split, table in site.splits.items():
            for image in table["image"]:
                split_of.setdefault(image.numpy().tobytes(), set()).add(split)
    assert len(split_of) == 80
    assert all(len(splits) == 1 for splits in split_of.values())
    assert sizes(federation)["home"] == (60, 20, 20)
    assert federation.notes == ("80 images repeat others exactly; each stays on one side of the splits",)


def test_every_fault_of_a_folder_is_told_at_once(tmp_path: Path) -> None:
    pets(tmp_path)
    (tmp_path / "home" / "cat" / "text.png").write_text("I am no picture")
    whole = (tmp_path / "home" / "dog" / "00.png").read_bytes()
    (tmp_path / "home" / "dog" / "00.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "shelter" / "dog" / "zero.jpg").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "lonely" / "cat").mkdir(parents=True)
    picture(5).save(tmp_path / "lonely" / "cat" / "0.png")
    refused(
        lambda: folder(tmp_path),
        "home/cat/text.png does not decode",
        "home/dog/00.png does not decode",
        "shelter/dog/zero.jpg does not decode",
        "site 'empty' is empty",
        "site 'lonely' has one class only, 'cat'",
    )


def test_a_public_share_comes_out_of_train_and_is_at_no_site(tmp_path: Path) -> None:
    root = pets(tmp_path / "pets")
    plain, shared = folder(root, image_size=8), folder(root, image_size=8, public=0.3)
    assert sizes(shared) == {"home": (6, 4, 4), "shelter": (6, 4, 4)}
    assert plain.public is None
    assert shared.public is not None
    assert shared.public["label"].bincount().tolist() == [6, 6]
    for part in ("validation", "test"):  # the figures stay comparable
        assert all(plain.digests[site][part] == shared.digests[site][part] for site in plain.sites)
    held = {image.numpy().tobytes() for s in shared.sites.values() for t in s.splits.values() for image in t["image"]}
    given = {image.numpy().tobytes() for image in shared.public["image"]}
    assert len(held) == 28
    assert len(given) == 12
    assert not held & given
    assert any("12 images are public" in note for note in shared.notes)
    refused(lambda: folder(root, public=-0.1), "public")
    refused(lambda: folder(root, public=0.7), "below 1")


def test_a_public_share_of_what_brings_its_splits(tmp_path: Path) -> None:
    pets(tmp_path / "home", ("train", "val", "test"))
    federation = folder(tmp_path, image_size=8, public=0.25)
    assert sizes(federation) == {"home": (16, 20, 20)}  # of each class 2.5 images, and a half is rounded to the even one
    assert federation.public is not None
    assert len(federation.public["label"]) == 4
    save_partition(federation, tmp_path / "partition.json")
    refused(
        lambda: folder(tmp_path, public=0.25, partition={"rule": "file", "path": str(tmp_path / "partition.json")}), "public"
    )


def test_what_is_no_image_folder_is_refused(tmp_path: Path) -> None:
    refused(lambda: folder(tmp_path / "nowhere"), "does not exist")
    (tmp_path / "file").write_text("x")
    refused(lambda: folder(tmp_path / "file"), "is not a folder")
    refused(lambda: folder(tmp_path), "is not an image folder", "site/class/image")
    (tmp_path / "cat").mkdir()
    picture(1).save(tmp_path / "cat" / "0.png")
    refused(lambda: folder(tmp_path), "has one class only, 'cat'")


def test_other_files_are_left_out_and_noted(tmp_path: Path) -> None:
    pets(tmp_path)
    (tmp_path / "home" / "cat" / "notes.txt").write_text("x")
    (tmp_path / "home" / "cat" / ".DS_Store").write_text("x")
    assert folder(tmp_path).notes == (
        f"1 entries in {tmp_path.name}/home are not images of a class and were ignored, notes.txt first",
    )


def test_too_few_images_for_a_split_are_refused(tmp_path: Path) -> None:
    refused(lambda: folder(pets(tmp_path, each=2)), "site 'home' has no test images", "site 'shelter' has no validation images")


@pytest.mark.parametrize(("validation", "test"), [(0.0, 0.2), (0.2, -1.0), (0.5, 0.5)])
def test_shares_that_leave_nothing_are_refused(tmp_path: Path, validation: float, test: float) -> None:
    refused(lambda: folder(tmp_path, validation=validation, test=test), "shares above 0, and a sum")


# Arrays

IMAGES = np.random.RandomState(0).randint(0, 256, (20, 6, 6, 3)).astype(np.uint8)
LABELS = np.arange(20) % 2


def test_arrays_of_any_layout_are_the_same_data() -> None:
    first = arrays({"a": (IMAGES, LABELS)})
    assert first.shape == (3, 6, 6)
    assert first.classes == ("0", "1")
    assert sizes(first) == {"a": (12, 4, 4)}
    channels_first = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
    assert arrays({"a": (channels_first, torch.from_numpy(LABELS))}).fingerprint == first.fingerprint
    assert arrays({"a": (IMAGES / 255, LABELS[:, None])}).fingerprint == first.fingerprint
    grey = arrays({"a": (IMAGES[..., 0], LABELS)})
    assert grey.fingerprint == arrays({"a": (IMAGES[..., :1], LABELS)}).fingerprint
    assert torch.equal(grey.sites["a"].train["image"][:, 0], grey.sites["a"].train["image"][:, 2])


def test_arrays_may_bring_their_splits_and_names() -> None:
    given = {
        "train": (IMAGES[:10], LABELS[:10]),
        "validation": (IMAGES[10:14], LABELS[10:14]),
        "test": (IMAGES[14:], LABELS[14:]),
    }
    federation = arrays({"a": given}, classes=("cat", "dog"), template="a {}", name="pets", image_size=12)
    assert sizes(federation) == {"a": (10, 4, 6)}
    assert federation.prompts == ("a cat", "a dog")
    assert federation.shape == (3, 12, 12)


def test_a_limit_takes_so_many_of_each_site_class_and_split() -> None:
    rng = np.random.default_rng(0)

    def some(labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
        return rng.integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8), np.array(labels)

    sites = {"a": {"train": some([0] * 9 + [1] * 3), "test": some([0] * 5 + [1] * 5)}, "b": {"train": some([0, 1] * 8)}}
    whole, part = arrays(sites), arrays(sites, limit=4)
    rows = {
        site: sorted(label for table in (each.train, each.validation) for label in table["label"].tolist())
        for site, each in part.sites.items()
    }
    assert rows["a"] == [0] * 4 + [1] * 3
    assert sorted(part.sites["a"].test["label"].tolist()) == [0] * 4 + [1] * 4
    assert len(rows["b"]) + len(part.sites["b"].test["label"]) == 8
    assert arrays(sites, limit=4).fingerprint == part.fingerprint != arrays(sites, limit=4, seed=1).fingerprint
    assert arrays(sites, limit=100).fingerprint == whole.fingerprint
    with pytest.raises(InputError, match="limit of 0"):
        arrays(sites, limit=-1)


def test_given_splits_lose_the_copies_outside_of_test() -> None:
    given = {
        "train": (IMAGES[:12], LABELS[:12]),
        "validation": (IMAGES[10:16], LABELS[10:16]),
        "test": (IMAGES[14:], LABELS[14:]),
    }
    federation = arrays({"a": given})
    assert sizes(federation) == {"a": (10, 4, 6)}
    assert federation.notes[-1].startswith("4 images of the given splits were dropped")


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ({}, "at least one site"),
        ({"a": (IMAGES, LABELS * 0)}, "site 'a' has one class only"),
        ({"a": (IMAGES[:0], LABELS[:0])}, "site 'a' is empty"),
        ({"a": (IMAGES, LABELS[:3])}, "expected whole-number labels [20]"),
        ({"a": (IMAGES, LABELS / 1)}, "got float64 [20]"),
        ({"a": (IMAGES, LABELS - 1)}, "expected labels from 0 to 2147483647, got -1 to 0"),
        ({"a": (IMAGES.astype(np.int32), LABELS)}, "expected uint8 images or floats from 0 to 1, got int32, 0 to 255"),
        ({"a": (np.full((20, 4, 4), np.nan), LABELS)}, "got float64, nan to nan"),
        ({"a": (IMAGES[:, 0, 0, 0], LABELS)}, "got [20]"),
        ({"a": IMAGES}, "expected a pair (images, labels), got ndarray"),
        ({"a": {"trian": (IMAGES, LABELS)}}, "did you mean 'train'?"),
        ({"a": {"test": (IMAGES, LABELS)}}, "expected a train split, got test"),
        ({"a": (IMAGES, LABELS), "b": (IMAGES[:, :5], LABELS)}, "images of one size"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(sites: dict[str, object], words: str) -> None:
    refused(lambda: arrays(sites), words)


# Files


def test_npz_with_keys_per_site(tmp_path: Path) -> None:
    path = tmp_path / "pets.npz"
    np.savez(
        path, my_home_x_train=IMAGES[:10], my_home_y_train=LABELS[:10], my_home_x_test=IMAGES[10:], my_home_y_test=LABELS[10:],
        classes=np.array(["cat", "dog"]), remark=np.array(3),
    )  # fmt: skip
    federation = npz(path)
    assert federation.name == "pets"
    assert federation.classes == ("cat", "dog")
    assert sizes(federation) == {"my_home": (8, 2, 10)}
    assert load(str(path), template="a {}").prompts == ("a cat", "a dog")


def test_npz_as_medmnist_has_it_can_be_dealt_to_sites(tmp_path: Path) -> None:
    path = tmp_path / "lungs.npz"
    content = {}
    for at, split in enumerate(("train", "val", "test")):
        content[f"{split}_images"] = np.random.RandomState(at).randint(0, 256, (40, 5, 5)).astype(np.uint8)
        content[f"{split}_labels"] = (np.arange(40) % 2)[:, None].astype(np.uint8)
    np.savez(path, **content)
    assert sizes(npz(path)) == {"lungs": (40, 40, 40)}
    partitioned = load(str(path), partition={"sites": 3, "rule": "dirichlet", "alpha": 1})
    assert [sum(column) for column in zip(*sizes(partitioned).values(), strict=True)] == [40, 40, 40]
    refused(lambda: load(str(path), partition={"sites": 3, "alhpa": 1}), "did you mean 'alpha'?")
    refused(lambda: load(str(path), partition={"rule": "iid"}), "needs sites")


def test_files_that_are_no_npz_are_refused(tmp_path: Path) -> None:
    def saved(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    refused(lambda: npz(tmp_path / "nowhere.npz"), "cannot be read")
    refused(lambda: npz(saved("text.npz", b"hello")), "damaged or not an .npz")
    refused(lambda: npz(saved("pickle.npz", b"\x80\x04]\x94(K\x01K\x02e.")), "damaged or not an .npz")
    np.savez(tmp_path / "whole.npz", a_x_train=IMAGES, a_y_train=LABELS)
    refused(lambda: npz(saved("half.npz", (tmp_path / "whole.npz").read_bytes()[:900])), "damaged or not an .npz")
    np.savez(tmp_path / "objects.npz", a_x_train=np.array([None, {}]))
    refused(lambda: npz(tmp_path / "objects.npz"), "damaged or not an .npz file of plain arrays")
    np.save(tmp_path / "one.npy", IMAGES)
    refused(lambda: npz((tmp_path / "one.npy").rename(tmp_path / "one.npz")), "holds one array")
    np.savez(tmp_path / "keys.npz", images=IMAGES)
    refused(lambda: npz(tmp_path / "keys.npz"), "SITE_x_train", "got images")
    np.savez(tmp_path / "unlabelled.npz", a_x_train=IMAGES)
    refused(lambda: npz(tmp_path / "unlabelled.npz"), "has 'a_x_train' but no 'a_y_train'")


# Names


def test_names_and_options_have_neighbours(tmp_path: Path) -> None:
    refused(lambda: load("digit4"), "there is no data 'digit4'", "did you mean 'digits4'?")
    refused(lambda: load("folder:/no/such/place"), "does not exist")
    refused(lambda: load("digits4", aplha=0.3), "no option 'aplha'; did you mean 'alpha'?")
    refused(lambda: load("digits4", alpha="much"), "expected float or none, got 'much'")
    refused(lambda: load("digits4", seed=True), "expected int, got True")
    refused(lambda: load(str(pets(tmp_path)), image_size=8.5), "expected int or none, got 8.5")
    refused(lambda: load(str(tmp_path), image_size=0), "image_size of 1 pixel or more")


# Real data, where they are


def test_five_digit_domains() -> None:
    root = os.environ.get("WARMFED_DATA")
    path = Path(root or "nowhere", "digits5", "digits5_32_small.npz")
    if not path.is_file():
        pytest.skip("set WARMFED_DATA to a folder that holds digits5/digits5_32_small.npz")
    federation = npz(path)
    assert sizes(federation) == {
        "chars74k_font": (800, 200, 300), "chars74k_street": (383, 96, 114),
        "mnist": (800, 200, 300), "mnist_m": (800, 200, 300), "usps": (800, 200, 300),
    }  # fmt: skip
    assert federation.shape == (3, 32, 32)
