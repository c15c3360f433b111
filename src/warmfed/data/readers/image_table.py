"""Readers of pictures that a CSV table lists."""

import csv as tables
import io
import string
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...utils.errors import InputError, suggest
from ...utils.files import open_regular
from ...utils.paths import expanded
from ..build import finished
from ..decode import Entry
from ..examples import WHOLE, Names, reader_options
from ..federation import SPLIT_NAMES, Federation


def csv(
    path: str | Path,
    *,
    image: str = "image",
    label: str = "label",
    site: str = "",
    split: str = "",
    group: str = "",
    root: str = "",
    **options: Any,
) -> Federation:
    """Return the federation of pictures in a CSV file, one per row, such as HAM10000's or CheXpert's.

    Args:
        path: the CSV file.
        image: column of the picture's path, or a pattern of columns: "patches/{patient}_{x}.png".
        label: column of the class.
        site: column of the site (the natural partition); empty: one site, with the file's name.
        split: column of train, validation or test; empty: random splits.
        group: column (patient, slide) whose images share one split.
        root: folder to which the paths are relative; empty: the folder of the CSV file.
        options: the fields of `ReaderOptions`.

    Raises:
        InputError: with all faults: missing columns or files, empty fields, unknown splits, …
    """
    common = reader_options(options)
    file = expanded(path)
    base = expanded(root) if root else file.parent
    faults: list[str] = []
    notes: list[str] = []
    names, sites, entries = Names(notes), set(), []
    with _table(file) as (header, rows):
        pattern = _pattern(image, header, file)
        at = {what: _column(column, header, file) for what, column in _named(label, site, split, group).items()}
        for number, row in rows:
            if len(row) != len(header):
                faults.append(f"line {number}: expected {len(header)} fields, got {len(row)}")
                continue
            name = "".join(each if isinstance(each, str) else row[each].strip() for each in pattern)
            value = {what: names(row[column]) for what, column in at.items()}
            here = value.get("site", names(file.stem))
            part = SPLIT_NAMES.get(value.get("split", "").lower(), "") if split else WHOLE
            sites |= {here} - {""}
            if common.sites is not None and here not in common.sites:
                continue
            if not name or not value["label"] or not here:
                faults.append(f"line {number}: expected an image, a label and a site, got an empty field")
            elif "\0" in name:
                faults.append(f"line {number}: the image's path has a NUL character; remove it")
            elif not part:
                faults.append(f"line {number}: expected split train, validation or test, got {value['split']!r}")
            else:
                entries.append(Entry(name, base / name, value["label"], here, part, value.get("group", "")))
    return finished(file.stem, entries, common, faults, notes, sites=sites)


def _named(label: str, site: str, split: str, group: str) -> dict[str, str]:
    given = {"site": site, "split": split, "group": group}
    return {"label": label} | {what: column for what, column in given.items() if column}


@contextmanager
def _table(file: Path) -> Iterator[tuple[list[str], Iterator[tuple[int, list[str]]]]]:
    """Open a CSV file: its header, and its rows with their line numbers; empty lines are skipped.

    Raises:
        InputError: The file cannot be read, is not CSV in UTF-8, or has no header.
    """
    try:
        with io.TextIOWrapper(open_regular(file), encoding="utf-8-sig", newline="") as lines:
            reader = tables.reader(lines)
            header = [name.strip() for name in next(reader, [])]
            if not any(header):
                raise InputError(f"table {file} has no header; expected the names of its columns in the first line")
            yield header, ((reader.line_num, row) for row in reader if row)
    except OSError as error:
        raise InputError(f"table {file} cannot be read: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"table {file} is not a CSV file in UTF-8 ({error.reason}); save it again") from error
    except tables.Error as error:
        raise InputError(f"table {file} is not a CSV file ({error}); save it again") from error


def _column(name: str, header: list[str], file: Path) -> int:
    """Return the place of a column; raise `InputError` if no column or several have the name."""
    count = Counter(header)[name]
    if count > 1:
        raise InputError(f"table {file} has {count} columns {name!r}; rename all but one")
    if not count:
        packed = next((sign for sign in (";", "\t") if len(header) == 1 and sign in header[0]), "")
        hint = f"; its fields seem to be separated by {packed!r}: save it with commas" if packed else suggest(name, header)
        raise InputError(f"table {file} has no column {name!r}{hint}")
    return header.index(name)


def _pattern(image: str, header: list[str], file: Path) -> list[str | int]:
    """Return the parts of the paths of pictures: texts, and places of columns.

    Args:
        image: a column, or a pattern with columns in braces; {{ and }} are braces. A column's name is taken as it is.
        header: the columns.
        file: the table, for errors.

    Raises:
        InputError: The pattern is not valid, or a column does not exist.
    """
    if image in header or "{" not in image:
        return [_column(image, header, file)]
    try:
        pieces = list(string.Formatter().parse(image))
    except ValueError as error:
        raise InputError(
            f"the pattern {image!r} of the option image is not valid ({error}); write it as '{{id}}.png'"
        ) from error
    parts: list[str | int] = []
    for text, column, form, conversion in pieces:
        parts.append(text)
        if column is None:
            continue
        whole = column + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
        if not column or (whole not in header and (form or conversion)):
            raise InputError(
                f"the pattern {image!r} of the option image has {{{whole}}}, expected the name of a column and nothing else: "
                "write it as '{id}.png'"
            )
        parts.append(_column(whole, header, file))
    return parts


_WILDS = ("patient", "node", "x_coord", "y_coord", "tumor", "slide", "center")


def camelyon17(path: str | Path, **options: Any) -> Federation:
    """Return WILDS's Camelyon17: each hospital is a site, and the images of a slide share one split.

    WILDS's own splits hold out whole hospitals; here each hospital has training, validation and test images.

    Args:
        path: folder with metadata.csv and patches.
        options: the fields of `ReaderOptions`.

    Raises:
        InputError: with all faults, if the data cannot be used.

    References:
        WILDS: Koh et al., 2021.
    """
    options = {"template": "a histology image of {} tissue", **options}
    common = reader_options(options)
    root = expanded(path)
    faults: list[str] = []
    entries = []
    with _table(root / "metadata.csv") as (header, rows):
        columns = {name: _column(name, header, root / "metadata.csv") for name in _WILDS}
        found = [(number, {name: row[at] for name, at in columns.items()}) for number, row in rows if len(row) == len(header)]
    for number, row in found:
        stem = f"patient_{row['patient']}_node_{row['node']}"
        name = f"patches/{stem}/patch_{stem}_x_{row['x_coord']}_y_{row['y_coord']}.png"
        label = {"0": "normal", "1": "tumor"}.get(row["tumor"], "")
        site, slide = f"hospital-{row['center']}", row["slide"]
        if label:
            entries.append(Entry(name, root / name, label, site, WHOLE, f"slide-{slide}"))
        else:
            faults.append(f"metadata.csv, line {number}: expected tumor 0 or 1, got {row['tumor']!r}")
    return finished("camelyon17", entries, common, faults, [])
