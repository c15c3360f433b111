"""Folders as people have them: stray pictures, folders of operating systems, names in other forms, odd split lists."""

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import picture, refused, sizes

from warmfed.data import folder, load
from warmfed.utils.errors import InputError

SITES, CLASSES = ("a", "b", "c"), ("cat", "dog")


def write(root: Path, *paths: str, each: int = 10) -> Path:
    """Write pictures into folders, and one picture for each path with a suffix."""
    for path in paths:
        files = [root / path] if "." in Path(path).name else [root / path / f"{i}.png" for i in range(each)]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(len(list(root.rglob("*.png"))) + 7).save(file)
    return root


def pets(root: Path) -> Path:
    return write(root, *(f"{site}/{name}" for site in SITES for name in CLASSES))


@pytest.mark.parametrize(
    "stray",
    [
        ("a/overview.png",),
        ("a/preview.png", "b/preview.png", "c/p1.png", "c/p2.png"),
        ("overview.png",),
        ("a/cat/old/1.png",),
        ("__MACOSX/a/cat/1.png", "@eaDir/x/y/1.png", ".thumbs/cat/1.png"),
        ("a/cat/deep/er/and/deeper/1.png",),
    ],
)
def test_stray_pictures_do_not_turn_sites_into_classes(stray: tuple[str, ...], tmp_path: Path) -> None:
    found = folder(write(pets(tmp_path), *stray), image_size=8)
    assert (found.classes, tuple(found.sites)) == (CLASSES, SITES)
    assert all(sum(rows) == 20 for rows in sizes(found).values())
    if stray[0].startswith("a/"):
        assert any("were ignored" in note for note in found.notes)


def test_a_stray_folder_in_a_class_does_not_turn_classes_into_sites(tmp_path: Path) -> None:
    found = folder(write(tmp_path, *CLASSES, "cat/masks/1.png"), image_size=8)
    assert (found.classes, len(found.sites)) == (CLASSES, 1)


def test_sites_and_classes_beside_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a/cat", "a/dog", "b")
    refused(lambda: folder(tmp_path), "cannot tell sites from classes", "'b' has images directly in it (0.png)", "'a' has them")


def test_a_link_in_a_circle_ends(tmp_path: Path) -> None:
    (pets(tmp_path) / "a" / "cat" / "again").symlink_to(tmp_path)
    assert sizes(folder(tmp_path, image_size=8))["a"] == (12, 4, 4)


def test_empty_sites_that_are_not_chosen_do_no_harm(tmp_path: Path) -> None:
    (pets(tmp_path) / "empty").mkdir()
    write(tmp_path, "broken/cat").joinpath("broken/cat/0.png").write_bytes(b"no picture")
    assert tuple(folder(tmp_path, image_size=8, sites=["a", " b"]).sites) == ("a", "b")
    refused(lambda: folder(tmp_path, sites=["A"]), "there is no site 'A'; known: a, b, broken, c, empty")
    refused(lambda: folder(tmp_path, sites=["a", "empty"]), "site 'empty' is empty")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["NFC", "NFD", " "]), min_size=4, max_size=4))
def test_one_name_in_any_form_is_one_class(tmp_path_factory: pytest.TempPathFactory, forms: list[str]) -> None:
    root = tmp_path_factory.mktemp("forms")
    names = [(site, name) for site in ("lyon", "nîmes") for name in ("café", "thé")]
    for (site, name), form in zip(names, forms, strict=True):
        text = f" {name} " if form == " " else unicodedata.normalize(form, name)
        write(root, f"{unicodedata.normalize('NFD' if form == 'NFD' else 'NFC', site)}/{text}", each=6)
    found = folder(root, image_size=8, classes=[unicodedata.normalize("NFD", "café"), "thé "])
    assert found.classes == ("café", "thé")
    assert tuple(found.sites) == ("lyon", "nîmes")
    assert sum(map(sum, sizes(found).values())) == 24


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    pets(tmp_path)
    for site in SITES:
        os.rename(os.fsencode(tmp_path / site / "cat"), os.fsencode(tmp_path / site) + b"/caf\xe9")
    refused(lambda: folder(tmp_path), "is not valid UTF-8")
    other = pets(tmp_path / "other")
    os.rename(os.fsencode(other / "a"), os.fsencode(other) + b"/\xe9")
    refused(lambda: folder(other), "is not valid UTF-8")


def test_pictures_whose_names_are_not_utf8_are_read(tmp_path: Path) -> None:
    root = pets(tmp_path)
    os.rename(os.fsencode(root / "a" / "cat" / "0.png"), os.fsencode(root / "a" / "cat") + b"/\xe9.png")
    found = folder(root, image_size=8)
    assert any("\udce9.png" in name for names in found.origin["a"].values() for name in names)


LINES = {
    "plain": "{path} {label}",
    "dotted": "./{path} {label}",
    "tab": "{path}\t{label}",
    "backslashes": "{back} {label}",
    "many blanks": "  {path}   {label}  ",
}


@pytest.mark.parametrize("style", LINES)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "marked"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_split_lists_in_any_style(style: str, mark: bytes, end: str, tmp_path: Path) -> None:
    root = pets(tmp_path)
    (root / "a" / "cat" / "0.png").rename(root / "a" / "cat" / "my cat.png")
    for site in SITES:
        parts: dict[str, list[str]] = {"train": [], "test": []}
        for file in sorted((root / site).rglob("*.png")):
            path = file.relative_to(root).as_posix()
            line = LINES[style].format(path=path, back=path.replace("/", "\\"), label=CLASSES.index(file.parent.name))
            parts["test" if file.stem in "012" else "train"].append(line)
        for part, lines in parts.items():
            (root / f"{site}_{part}.txt").write_bytes(mark + end.join(lines).encode())
    found = load("folder", str(root), image_size=8)
    assert {sum(rows) for rows in sizes(found).values()} == {20}
    assert sizes(found)["b"][2] == 6


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80))
def test_any_split_list(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    root = tmp_path_factory.getbasetemp() / "any-list"
    if not root.exists():
        pets(root)
    (root / "a_train.txt").write_bytes(content)
    try:
        folder(root, image_size=8)
    except InputError as error:
        assert "a_train.txt" in str(error) or "site 'a'" in str(error)  # noqa: PT017
