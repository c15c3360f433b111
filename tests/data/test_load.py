"""Loading of each kind of data: folders with split lists, tables, idx files, Parquet files and saved partitions."""

import gzip
import json
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import pets, picture, refused, sizes
from PIL import Image

from warmfed.cli.parser import main
from warmfed.data import DataError, Federation, camelyon17, csv, folder, idx, load, npz, save_partition
from warmfed.data.examples import Examples, texts
from warmfed.data.splits import split, units


def saved(path: Path, seed: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return path.as_posix()


def domains(root: Path, each: int = 10) -> dict[str, list[str]]:
    """Write a small DomainNet: clipart and "real world"; the lists number the classes bee 0 and The_Tower 1."""
    files: dict[str, list[str]] = {}
    for s, site in enumerate(("clipart", "real world")):
        for c, name in enumerate(("bee", "The_Tower")):
            for i in range(each):
                file = f"{site}/{name}/{site}_{c:03}_{i:06}.jpg"
                saved(root / file, 1000 * s + 100 * c + i)
                files.setdefault(site, []).append(f"{file} {c}")
    return files


def write_lists(root: Path, files: dict[str, list[str]], *, test: int = 3) -> None:
    for site, lines in files.items():
        late = [line for line in lines if int(line.split(".")[0][-6:]) < test]
        (root / f"{site}_test.txt").write_text("\n".join(late))
        (root / f"{site}_train.txt").write_text("\n".join(line for line in lines if line not in late) + "\n")


def origin(federation: Federation, site: str, part: str) -> list[str]:
    return list(federation.origin[site][part])


# Trees


def test_domainnet_with_its_split_lists(tmp_path: Path) -> None:
    files = domains(tmp_path)
    write_lists(tmp_path, files)
    federation = folder(tmp_path, image_size=8)
    assert federation.classes == ("bee", "The_Tower")  # as the lists number them, not as they sort
    assert sizes(federation) == {"clipart": (12, 2, 6), "real world": (12, 2, 6)}
    assert origin(federation, "clipart", "test") == [
        f"clipart/{name}/clipart_{c:03}_{i:06}.jpg" for c, name in ((1, "The_Tower"), (0, "bee")) for i in range(3)
    ]
    assert f"2 sites are split by the lists in {tmp_path.name}" in federation.notes
    assert sizes(folder(tmp_path, image_size=8, lists="off")) == {"clipart": (12, 4, 4), "real world": (12, 4, 4)}


def test_lists_elsewhere_and_images_in_none(tmp_path: Path) -> None:
    files = domains(tmp_path / "images")
    (tmp_path / "splits").mkdir()
    files["clipart"] = files["clipart"][:-1]
    write_lists(tmp_path / "splits", files)
    federation = folder(tmp_path / "images", image_size=8, lists=str(tmp_path / "splits"))
    assert sum(sizes(federation)["clipart"]) == 19
    assert "1 images were left out, since no list has them" in federation.notes
    refused(lambda: folder(tmp_path / "images", lists=str(tmp_path / "nowhere")), "has no split lists")


def test_pacs_with_its_folds(tmp_path: Path) -> None:
    files = domains(tmp_path)
    for site, lines in files.items():
        (tmp_path / f"{site}_train_kfold.txt").write_text("\n".join(lines[::2]))
        (tmp_path / f"{site}_crossval_kfold.txt").write_text("\n".join(lines[1::2]))
        (tmp_path / f"{site}_test_kfold.txt").write_text("\n".join(lines))  # all images once more
    assert sizes(folder(tmp_path, image_size=8)) == {"clipart": (8, 10, 2), "real world": (8, 10, 2)}


def test_every_fault_of_the_lists_is_told_at_once(tmp_path: Path) -> None:
    files = domains(tmp_path)
    write_lists(tmp_path, files)
    with (tmp_path / "clipart_train.txt").open("a") as file:
        file.write(
            "clipart/bee/gone.jpg 0\nclipart/bee\nclipart/bee/clipart_000_000001.jpg 0\nclipart/bee/clipart_000_000005.jpg 7\n"
        )
    refused(
        lambda: folder(tmp_path, image_size=8),
        "clipart_train.txt, line 15: clipart/bee/gone.jpg is not in the folder",
        "clipart_train.txt, line 16: expected `path label`, got 'clipart/bee'",
        "clipart_train.txt, line 17: clipart/bee/clipart_000_000001.jpg is in the test list as well",
        "the lists give class 'bee' several labels, 0, 7",
    )


def test_a_tree_of_classes_is_one_site(tmp_path: Path) -> None:
    pets(tmp_path / "zoo", ("animals",))
    (tmp_path / "zoo" / "animals").rename(tmp_path / "animals")
    assert sizes(folder(tmp_path / "animals", image_size=8)) == {"animals": (12, 4, 4)}
    partitioned = folder(tmp_path / "animals", image_size=8, partition={"sites": 2})
    assert sizes(partitioned) == {"site-0": (6, 2, 2), "site-1": (6, 2, 2)}
    assert partitioned.name == "animals partitioned into 2 by iid"


def test_a_tree_of_splits_is_one_site(tmp_path: Path) -> None:
    pets(tmp_path / "x", ("train", "test"))
    assert sizes(folder(tmp_path / "x", image_size=8)) == {"x": (16, 4, 20)}


def test_office_31_has_a_folder_of_images_at_each_site(tmp_path: Path) -> None:
    for s, site in enumerate(("amazon", "dslr")):
        pets(tmp_path / site, ("images",), start=5000 * s)
    assert sizes(folder(tmp_path, image_size=8)) == {"amazon": (12, 4, 4), "dslr": (12, 4, 4)}


def test_classes_and_sites_can_be_chosen(tmp_path: Path) -> None:
    pets(tmp_path, ("a", "b", "c"))
    saved(tmp_path / "a" / "ant" / "0.png", 77)
    federation = folder(tmp_path, image_size=8, classes=["dog", "cat"], sites=["a", "c"], name="mine")
    assert (federation.name, federation.classes, list(federation.sites)) == ("mine", ("dog", "cat"), ["a", "c"])
    assert "the classes ant were left out" in federation.notes
    label = federation.sites["a"].train["label"][0].item()
    assert origin(federation, "a", "train")[0].split("/")[1] == federation.classes[label]
    refused(
        lambda: folder(tmp_path, classes=["dog", "cta"], sites=["a", "d"]), "no class 'cta'; did you mean 'cat'", "no site 'd'"
    )


@pytest.mark.parametrize(("size", "channels"), [(32, 1), (64, 3), (224, 3)])
def test_size_and_channels_are_settings(tmp_path: Path, size: int, channels: int) -> None:
    pets(tmp_path, ("a",), each=5)
    federation = load("folder", str(tmp_path), image_size=size, channels=channels)
    assert federation.shape == (channels, size, size)


def test_grey_is_the_same_from_a_file_and_from_an_array(tmp_path: Path) -> None:
    from warmfed.data.image_io import decode, from_array

    saved(tmp_path / "x.png", 3)
    grey = np.asarray(picture(3).convert("L"))
    assert (decode(tmp_path / "x.png", 8, 1)[0] == grey).all()
    assert (from_array(np.asarray(picture(3))[None], None, 1)[0, 0] == grey).all()


def test_more_kinds_of_files(tmp_path: Path) -> None:
    from warmfed.data.image_io import UnreadableError, decode

    Image.fromarray(np.full((20, 20), 50 * 256 + 99, np.uint16)).save(tmp_path / "deep.tiff")
    assert (decode(tmp_path / "deep.tiff", 8) == 50).all()
    Image.fromarray(np.full((20, 20), 0.5, np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(UnreadableError, match="floating-point pixels"):
        decode(tmp_path / "float.tiff", 8)


@pytest.mark.parametrize("name", ["domainnet", "pacs", "camelyon17"])
def test_the_examples_read_what_they_are_for(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Small folders with the layout and the lists of the originals."""
    examples = Path(__file__).parents[2] / "examples"
    options = tomllib.loads((examples / f"{name}.toml").read_text())["data"]["options"]
    if name == "camelyon17":
        camelyon(tmp_path)
    else:
        first = 1 if name == "pacs" else 0  # PACS numbers its classes from 1
        for s, site in enumerate(options.get("sites", ["art_painting", "cartoon", "photo", "sketch"])):
            lines = []
            for c, label in enumerate(options["classes"]):
                for i in range(10):
                    saved(tmp_path / site / label / f"{i}.jpg", 1000 * s + 10 * c + i)
                    lines.append(f"{site}/{label}/{i}.jpg {c + first}")
            parts = ("train_kfold", "crossval_kfold") if name == "pacs" else ("train", "test")
            for part, chosen in zip(parts, (lines[::2], lines[1::2]), strict=True):
                (tmp_path / f"{site}_{part}.txt").write_text("\n".join(chosen) + "\n")
    command = ["data", str(examples / f"{name}.toml"), "--json", "--set", f"data.path={tmp_path}", "data.options.image_size=8"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    expected = {"domainnet": (600, 6, 10), "pacs": (280, 4, 7), "camelyon17": (120, 2, 2)}[name]
    assert (found["images"], len(found["sites"]), len(found["classes"])) == expected
    assert found["classes"] == options.get("classes", ["normal", "tumor"])


# Tables


def skins(root: Path, count: int = 40) -> Path:
    rows = ["image_id,dx,place,lesion,set"]
    for i in range(count):
        saved(root / "img" / f"I{i}.png", i)
        place, part = "north" if i < count // 2 else "south", "test" if i % 5 == 0 else "train"
        rows.append(f"I{i},{'mel' if i % 2 else 'nv'},{place},L{i // 4},{part}")
    (root / "meta.csv").write_text("\n".join(rows))
    return root / "meta.csv"


COLUMNS = {"image": "img/{image_id}.png", "label": "dx", "image_size": 8}


def test_a_csv_file_names_the_images(tmp_path: Path) -> None:
    table = skins(tmp_path)
    assert sizes(csv(table, **COLUMNS)) == {"meta": (24, 8, 8)}
    federation = csv(table, site="place", split="set", **COLUMNS)
    assert federation.classes == ("mel", "nv")
    assert sizes(federation) == {"north": (12, 4, 4), "south": (12, 4, 4)}


def test_a_group_stays_in_one_split(tmp_path: Path) -> None:
    federation = csv(skins(tmp_path), site="place", group="lesion", **COLUMNS)
    assert sizes(federation) == {"north": (12, 4, 4), "south": (12, 4, 4)}
    lesions = [{int(name[5:-4]) // 4 for name in origin(federation, "north", part)} for part in ("train", "validation", "test")]
    assert sum(map(len, lesions)) == len(set().union(*lesions)) == 5


def test_every_fault_of_a_csv_file_is_told_at_once(tmp_path: Path) -> None:
    table = skins(tmp_path)
    with table.open("a") as file:
        file.write("\nI99,mel,north,L9,train\nI1,,north,L9,train\nI2,nv,,L9,train\nI3,nv,south,L9,sunday\n")
    (tmp_path / "img" / "I7.png").write_bytes(b"no picture")
    refused(
        lambda: csv(table, site="place", split="set", **COLUMNS),
        "line 43: expected an image, a label and a site", "line 44: expected an image",
        "line 45: expected split train, validation or test, got 'sunday'",
        "img/I99.png cannot be read: No such file", "img/I7.png does not decode",
    )  # fmt: skip
    refused(lambda: csv(table, **COLUMNS | {"label": "dxx"}), "has no column 'dxx'")
    refused(lambda: csv(tmp_path / "none.csv"), "cannot be read: No such file")


def camelyon(root: Path) -> Path:
    rows = [",patient,node,x_coord,y_coord,tumor,slide,center,split"]
    for i in range(120):
        center, slide = i % 2, i % 2 * 10 + i // 12
        stem = f"patient_{slide:03}_node_{slide % 5}"
        saved(root / "patches" / stem / f"patch_{stem}_x_{i}_y_7.png", i)
        rows.append(f"{i},{slide:03},{slide % 5},{i},7,{i // 2 % 2},{slide},{center},0")
    (root / "metadata.csv").write_text("\n".join(rows))
    return root


def test_camelyon17_of_wilds(tmp_path: Path) -> None:
    federation = load(str(camelyon(tmp_path)), image_size=8)
    assert federation.classes == ("normal", "tumor")
    assert federation.prompts[1] == "a histology image of tumor tissue"
    assert sizes(federation) == {"hospital-0": (36, 12, 12), "hospital-1": (36, 12, 12)}
    slides = [
        {name.split("/")[1] for name in origin(federation, "hospital-1", part)} for part in ("train", "validation", "test")
    ]
    assert sum(map(len, slides)) == len(set().union(*slides)) == 10
    (tmp_path / "metadata.csv").write_text("a,b\n1,2")
    refused(lambda: camelyon17(tmp_path), "has no column 'patient'")


# Arrays in files


def write_idx(path: Path, values: np.ndarray, *, packed: bool) -> None:
    data = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.with_name(path.name + ".gz") if packed else path).write_bytes(gzip.compress(data) if packed else data)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_as_mnist_has_them(tmp_path: Path, packed: bool) -> None:
    for at, (split_name, count) in enumerate((("train", 40), ("t10k", 10))):
        images = np.random.RandomState(at).randint(0, 256, (count, 7, 7))
        write_idx(tmp_path / f"{split_name}-images-idx3-ubyte", images, packed=packed)
        write_idx(tmp_path / f"{split_name}-labels-idx1-ubyte", np.arange(count) % 2, packed=packed)
    federation = load(str(tmp_path))
    assert sizes(federation) == {tmp_path.name: (32, 8, 10)}
    assert federation.shape == (3, 7, 7)
    assert (federation.sites[tmp_path.name].test["image"][:, 1].numpy() == images).all()
    next(tmp_path.glob("t10k-labels*")).write_bytes(b"\x00\x00")
    next(tmp_path.glob("train-labels*")).unlink()
    refused(lambda: idx(tmp_path), "has no train-labels", "t10k-images", "damaged")
    refused(lambda: idx(tmp_path / "none"), "has no idx files")


def test_npz_of_keras_and_with_a_domain_of_each_image(tmp_path: Path) -> None:
    images, labels = np.random.RandomState(0).randint(0, 256, (40, 6, 6)).astype(np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "usps.npz", x_train=images[:30], y_train=labels[:30], x_test=images[30:], y_test=labels[30:])
    assert sizes(npz(tmp_path / "usps.npz")) == {"usps": (24, 6, 10)}
    np.savez(
        tmp_path / "office.npz", x=images, y=labels, domain=(np.arange(40) // 20).astype(np.uint8),
        domains=np.array(["amazon", "dslr"]), classes=np.array(["mug", "pen"]),
    )  # fmt: skip
    assert sizes(npz(tmp_path / "office.npz")) == {"amazon": (12, 4, 4), "dslr": (12, 4, 4)}
    assert npz(tmp_path / "office.npz").classes == ("mug", "pen")


def test_long_arrays_are_read_piece_by_piece_and_every_piece_is_checked(tmp_path: Path) -> None:
    images = np.random.RandomState(0).random_sample((2500, 3, 3)).astype(np.float32)
    np.savez_compressed(tmp_path / "a.npz", x_train=images, y_train=np.arange(2500) % 3)
    federation = npz(tmp_path / "a.npz")
    got = torch.cat([table["image"] for table in federation.sites["a"].splits.values()])[:, 0]
    rows = [int(name.split("/")[1]) for part in ("train", "validation", "test") for name in origin(federation, "a", part)]
    assert (got.numpy() == np.rint(images[rows] * 255).astype(np.uint8)).all()
    images[2400] = 7
    np.savez_compressed(tmp_path / "b.npz", x_train=images, y_train=np.arange(2500) % 3)
    refused(lambda: npz(tmp_path / "b.npz"), "expected uint8 images or floats from 0 to 1, got float32")


# Partitions


def test_a_partition_is_saved_and_dealt_again(tmp_path: Path) -> None:
    root = pets(tmp_path / "pets", each=30)
    rule = {"sites": 3, "rule": "dirichlet", "alpha": 1.0, "min_partition_size": 10}
    partitioned = folder(root, image_size=8, partition=rule)
    digest = save_partition(partitioned, tmp_path / "partition.json")
    assert len(digest) == 64
    again = folder(root, image_size=8, partition={"rule": "file", "path": str(tmp_path / "partition.json")})
    assert again.fingerprint == partitioned.fingerprint
    assert again.origin == partitioned.origin
    (root / "home" / "cat" / "00.png").unlink()
    refused(
        lambda: folder(root, image_size=8, partition={"rule": "file", "path": str(tmp_path / "partition.json")}),
        "home/cat/00.png is not in the data",
    )
    content = json.loads((tmp_path / "partition.json").read_text())
    content["sites"]["site-0"]["train"].pop()
    (tmp_path / "partition.json").write_text(json.dumps(content))
    refused(
        lambda: folder(root, partition={"rule": "file", "path": str(tmp_path / "partition.json")}), "damaged or of another kind"
    )


ROWS = st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 9), st.integers(0, 3))


@settings(deadline=None, max_examples=60)
@given(st.lists(ROWS, min_size=1, max_size=60), st.integers(0, 5))
def test_nothing_that_belongs_together_is_parted(rows: list[tuple[int, int, int, int]], seed: int) -> None:
    site, label, image, group = (np.array(column) for column in zip(*rows, strict=True))
    digest = np.zeros((len(rows), 32), np.uint8)
    digest[:, 0] = image
    names = texts(f"g{g}" if g else "" for g in group.tolist())
    pool = Examples(np.zeros((len(rows), 1, 1, 1), np.uint8), label, texts(f"s{s}" for s in site.tolist()),
                texts(["all"] * len(rows)), texts("x" for _ in rows), digest, names)  # fmt: skip
    found = split(pool, {"test": 0.2, "validation": 0.2, "public": 0.1}, seed)
    assert set(found.tolist()) <= {"train", "validation", "test", "public"}
    for key in (image.tolist(), [name or i for i, name in enumerate(names.tolist())]):
        held: dict[object, set[str]] = {}
        for each, part in zip(key, found.tolist(), strict=True):
            held.setdefault(each, set()).add(part)
        assert all(len(parts) == 1 for parts in held.values())
    assert (split(pool, {"test": 0.2, "validation": 0.2, "public": 0.1}, seed) == found).all()
    assert len(units(pool)) == len(rows)


# The command


def test_the_command_shows_draws_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = pets(tmp_path / "pets")
    (tmp_path / "pets.toml").write_text(
        '[data]\nsource = "folder"\noptions = { image_size = 8 }\n[compare]\nseeds = [0]\n[arms.fedavg]\n'
    )
    command = ["data", str(tmp_path / "pets.toml"), "--set", f"data.path={root}"]
    assert main([*command, "--plot", str(tmp_path / "plot.png"), "--save", str(tmp_path / "partition.json")]) == 0
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()[:4]] == [
        ["site", "split", "images", "cat", "dog"], ["home", "train", "12", "6", "6"],
        ["validation", "4", "2", "2"], ["test", "4", "2", "2"],
    ]  # fmt: skip
    federation = folder(root, image_size=8)
    assert f"fingerprint: {federation.fingerprint}" in out
    assert "pets: 2 sites, 40 images, 2 classes" in out
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.size[0] > 500
    assert json.loads((tmp_path / "partition.json").read_text())["data_sha256"] == federation.fingerprint
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sites"]["shelter"]["test"] == [2, 2]
    assert (found["pictures"], found["image"], found["bytes"]) == ([[8, 8], [8, 8]], [3, 8, 8], 40 * 192)
    assert found["cache"]["folder"] == os.environ["WARMFED_CACHE"]


def test_the_command_names_every_fault_and_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = pets(tmp_path / "pets", each=20)
    for i in range(20):
        (root / "home" / "cat" / f"{i:02}.png").write_bytes(b"x")
    (root / "empty").mkdir()
    saved(root / "lonely" / "cat" / "0.png", 1)
    with pytest.raises(DataError) as caught:
        folder(root)
    assert len(caught.value.faults) == 23  # with home, which has one class only without its cats
    assert "and 11 more, `warmfed data` names them all" in str(caught.value)
    arguments = ["data", "--set", "data.source=folder", f"data.path={root}"]
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.err == "warmfed: pets is not usable: 23 faults, listed above\n"
    assert len(told.out.splitlines()) == 23
    assert {f"home/cat/{i:02}.png does not decode as an image; replace or remove it" for i in range(20)} < set(
        told.out.splitlines()
    )
    assert main([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["faults"] == list(caught.value.faults)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.source=npz"], "needs a path; set data.path"),
        (["data.source=nzp", "data.path=x"], "did you mean 'npz'?"),
        (["data.pth=x"], "did you mean 'path'?"),
        (["data.source=idx", "data.path=/no/where"], "has no idx files"),
        (["data.source=folder", "data.path=.", "data.options.channels=2"], "channels must be 3 (colour) or 1 (grey)"),
        (["data.source=parquet", "data.path=/no/where"], "Parquet files"),
    ],
)
def test_the_command_refuses_in_one_line(words: Sequence[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--set", *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
