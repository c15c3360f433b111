"""Tables of pictures as people have them: patterns, repeated rows, blanks and other separators."""

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import pets, refused, sizes

from warmfed.data import csv, load, save_partition
from warmfed.utils.errors import InputError


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = pets(tmp_path_factory.mktemp("table"), ("home",))
    rows = [f"home/{name}/{i:02},{name},{i % 2}" for name in ("cat", "dog") for i in range(10)]
    (root / "t.csv").write_text("\n".join(["id,label,a:b", *rows]) + "\n")
    return root / "t.csv"


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("{id.png}", "has no column 'id.png'"),
        ("{id[x]}.png", "has no column 'id[x]'"),
        ("{}.png", "expected the name of a column and nothing else"),
        ("{id:05d}.png", "has {id:05d}, expected the name of a column and nothing else"),
        ("{id!r}.png", "has {id!r}, expected the name of a column and nothing else"),
        ("{id.png", "is not valid"),
        ("id}.png", "has no column 'id}.png'"),
        ("{0}.png", "has no column '0'"),
    ],
)
def test_slips_in_a_pattern(pattern: str, told: str, table: Path) -> None:
    refused(lambda: csv(table, image=pattern), told)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="{}ida:b!r.[]0png", max_size=12))
def test_any_pattern(table: Path, pattern: str) -> None:
    with suppress(InputError):
        csv(table, image=pattern, image_size=8)


def test_a_pattern_takes_a_column_by_its_whole_name(table: Path) -> None:
    refused(lambda: csv(table, image="{{{a:b}}}/{id}.png"), "{0}/home/cat/00.png cannot be read")
    assert sizes(csv(table, image="{id}.png", image_size=8)) == {"t": (12, 4, 4)}


def test_repeated_rows_come_back_from_a_saved_partition(table: Path, tmp_path: Path) -> None:
    lines = table.read_text().splitlines()
    twice = table.with_name("twice.csv")
    twice.write_text("\n".join([lines[0], *lines[1:], *lines[1:]]) + "\n")
    first = csv(twice, image="{id}.png", image_size=8, name="pets")
    save_partition(first, tmp_path / "p.json")
    assert any(name.endswith(".png (2)") for name in first.origin["twice"]["train"])
    again = csv(twice, image="{id}.png", image_size=8, partition={"rule": "file", "path": str(tmp_path / "p.json")})
    assert again.fingerprint == first.fingerprint


def written(root: Path, text: str | bytes) -> Path:
    path = root / "other.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("image;label\na;b\n", "its fields seem to be separated by ';'"),
        ("image,label,label\na,b,c\n", "has 2 columns 'label'"),
        ("image,label\na,b,c\n", "line 2: expected 2 fields, got 3"),
        ("image,label\na\n", "line 2: expected 2 fields, got 1"),
        ("", "has no header"),
        (b"image,label\n\xff\xfea,b\n", "is not a CSV file in UTF-8"),
        ("image,label\na\0b,cat\n", "line 2: the image's path has a NUL character"),
        ("image,label\n , cat\n", "line 2: expected an image, a label and a site, got an empty field"),
    ],
)
def test_tables_with_faults(text: str | bytes, told: str, tmp_path: Path) -> None:
    refused(lambda: csv(written(tmp_path, text)), told)


def test_blanks_forms_and_chosen_sites(table: Path) -> None:
    forms = ("caf\u00e9", "cafe\u0301")
    rows = [f" home/{n}/{i:02}.png , {n}{' ' * (i % 2)},{forms[i % 2]}, Train" for n in ("cat", "dog") for i in range(10)]
    path = table.with_name("blanks.csv")
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(["image , label,site,split", *rows, "x,,b,train", "x,cat,,test"]).encode())
    found = csv(path, site="site", split="split", sites=["cafe\u0301"], image_size=8)
    assert (list(found.sites), found.classes) == (["caf\u00e9"], ("cat", "dog"))
    refused(lambda: csv(path, site="site", sites=["kaffee"]), "there is no site 'kaffee'")
    refused(lambda: csv(path, site="site", split="split"), "line 22: expected an image, a label and a site")


def test_names_that_look_alike_are_noted(table: Path) -> None:
    rows = [f"home/{name}/{i:02}.png,{label}" for name, label in (("cat", "Cat"), ("dog", "cat")) for i in range(10)]
    path = table.with_name("alike.csv")
    path.write_text("\n".join(["image,label", *rows]))
    assert "the classes 'Cat', 'cat' look alike" in " ".join(load("csv", str(path), image_size=8).notes)
