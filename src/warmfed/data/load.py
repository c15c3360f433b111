"""Load federations by name; all options are checked before any data are read."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..utils.errors import InputError, suggest
from ..utils.paths import expanded, is_file, is_folder, matching
from ..utils.settings import check_seed
from .build import partition
from .class_skew import ClassSkew, hold_classes
from .examples import ReaderOptions
from .federation import Federation
from .partition import Partition
from .readers import READERS
from .readers.digits4 import digits4

_TABLES: dict[str, Any] = {"partition": Partition, "held": ClassSkew}
"""Options that are tables, and the classes of their fields."""
_COLUMNS = dict.fromkeys(("image", "label", "site", "group"), str)


def load(name: str, /, path: str = "", **options: Any) -> Federation:
    """Return a federation.

    Args:
        name: "digits4"; a reader ("folder", "npz", "idx", "csv", "camelyon17", "parquet", "hub"); "READER:PATH"; or a path.
        path: the file, folder or data set that the reader reads.
        options: options of the reader.

    Raises:
        InputError: if the name or an option is unknown (with the nearest known one), or the data cannot be used.
    """
    reader, found = _found(name, path)
    what = f"data {name!r}"
    for key in _TABLES:
        if not isinstance(options.get(key), Mapping | None):
            raise InputError(f"data.options.{key} must be a table of settings; got {options[key]!r}")
    _checked(options, _known(reader), what)
    for key, cls in _TABLES.items():
        if options.get(key):
            _checked(options[key], {f.name: get_type_hints(cls)[f.name] for f in fields(cls)}, f"data.options.{key}")
    held = options.pop("held", None)
    if reader == "digits4":
        partitioning = options.pop("partition", None)
        federation = digits4(**{key: value for key, value in options.items() if key != "cache"})
        federation = federation if partitioning is None else partition(federation, **partitioning)
    else:
        federation = READERS[reader](found, **options)
    return federation if held is None else hold_classes(federation, **held)


def _found(name: str, path: str) -> tuple[str, str]:
    """Return the reader and the path of a data source."""
    head, colon, tail = name.partition(":")
    if path or (colon and head in READERS):
        reader, place = (name, path) if path else (head, tail)
        if reader not in READERS or reader == "digits4":
            readers = [each for each in READERS if each != "digits4"]
            raise InputError(f"data source {reader!r} takes no path; expected a reader{suggest(reader, readers)}")
        return reader, place
    where = expanded(name)
    if name == "digits4":
        return name, ""
    if name in READERS:
        raise InputError(f"data source {name!r} needs a path; set data.path")
    for kind, pattern in (("npz", ".npz"), ("csv", ".csv"), ("parquet", ".parquet")):
        if where.suffix == pattern:
            return kind, name
    if is_folder(where):
        return _kind(where), name
    expected = "expected digits4, a reader with a path, a folder or an .npz file"
    raise InputError(f"there is no data {name!r}: {expected}{suggest(name, list(READERS))}")


def _kind(where: Path) -> str:
    """Return the reader for a folder."""
    if is_file(where / "metadata.csv") and is_folder(where / "patches"):
        return "camelyon17"
    if is_file(where / "dataset_info.json") or is_file(where / "dataset_dict.json") or any(matching(where, "*.parquet")):
        return "parquet"
    return "idx" if any(matching(where, "*-idx3-ubyte*")) else "folder"


def _known(reader: str) -> dict[str, Any]:
    """Return the options of a reader and their types."""
    function = READERS[reader]
    own = {
        name: get_type_hints(function)[name]
        for name, p in inspect.signature(function).parameters.items()
        if name != "path" and p.kind is not p.VAR_KEYWORD
    }
    own = {**own, "held": Mapping[str, Any] | None}
    if reader == "digits4":
        return own | {"partition": Mapping[str, Any] | None, "cache": str | None}
    columns = _COLUMNS if reader in ("parquet", "hub") else {}
    return own | columns | {f.name: get_type_hints(ReaderOptions)[f.name] for f in fields(ReaderOptions)}


def _checked(options: Mapping[str, Any], known: Mapping[str, Any], what: str) -> None:
    """Raise InputError if an option is unknown or has the wrong type."""
    for key, value in options.items():
        if new := {**ReaderOptions.RENAMED, **Partition.RENAMED}.get(key):
            raise InputError(f"option {key!r} of {what} is now called {new}; rename it")
        if key not in known:
            raise InputError(f"{what} has no option {key!r}{suggest(key, list(known))}")
        kinds = _kinds(known[key])
        if not any(_is_a(value, kind) for kind in kinds):
            names = " or ".join("none" if kind is type(None) else kind.__name__.lower() for kind in kinds)
            raise InputError(f"option {key!r} of {what}: expected {names}, got {value!r}")
        if key == "seed":
            check_seed(value, f"option {key!r} of {what}")


def _kinds(declared: Any) -> list[type]:
    """Return the plain types of a declared type: float and None for `float | None`."""
    parts = get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)
    return [str if get_origin(part) is Literal else get_origin(part) or part for part in parts]


def _is_a(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is Sequence and isinstance(value, str))
