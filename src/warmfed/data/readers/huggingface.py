"""What the libraries of others read and deal: Hugging Face `datasets`, and flwr-datasets' partitioners (extra "data")."""

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...utils.errors import InputError, suggest
from ...utils.files import make_folder, open_regular, read_regular
from ..build import finished
from ..decode import Entry
from ..examples import WHOLE, ReaderOptions, reader_options
from ..extras import hf_datasets
from ..federation import SPLIT_NAMES, Federation
from ..image_io import MOST
from .archives import plausible


def parquet(path: str | Path, **options: Any) -> Federation:
    """Parquet files (one, a folder of them, or a pattern), or a folder that `Dataset.save_to_disk` wrote; no network.

    Files named train-*, validation-* or test-* are these splits. Options as in `hub`.
    """
    datasets, where = hf_datasets(), Path(path).expanduser()
    if (where / "dataset_info.json").is_file() or (where / "dataset_dict.json").is_file():
        try:
            for file in where.rglob("*"):
                if not file.is_dir():
                    open_regular(file).close()
            found = datasets.load_from_disk(str(where))
        except (OSError, ValueError) as error:
            raise InputError(f"the data set saved in {where} is damaged ({error}); save it anew") from error
        return _federation(where.stem, found if isinstance(found, Mapping) else {WHOLE: found}, options)
    files = sorted(where.rglob("*.parquet")) if where.is_dir() else [Path(each) for each in sorted(glob.glob(str(where)))]
    kept = _prepared(options)
    if not files:
        raise InputError(f"there are no Parquet files at {where}; check the path")
    parts: dict[str, list[str]] = {}
    for file in files:
        split = SPLIT_NAMES.get(file.stem.split("-")[0].split("_")[0], WHOLE)
        parts.setdefault(split, []).append(str(file))
    tables = {}
    for split, members in parts.items():
        try:
            for each in members:
                _sound(Path(each))
            tables[split] = datasets.concatenate_datasets(
                [datasets.Dataset.from_parquet(each, cache_dir=kept, keep_in_memory=False) for each in members]
            )
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise InputError(f"the Parquet files at {where} do not read as one table ({reason}); check them") from error
    return _federation(where.stem, tables, options)


def _prepared(options: Mapping[str, Any]) -> str:
    """The private folder where `datasets` keeps the tables that it makes of Parquet files: they hold a site's images."""
    folder = ReaderOptions(cache=options.get("cache")).store.folder / "tables"
    try:
        make_folder(folder)
    except OSError as error:
        raise InputError(f"cannot make {folder}: {error.strerror}; name another place by data.cache") from error
    return str(folder)


def _sound(path: Path) -> None:
    """Raise `OSError` or `ValueError` where a Parquet file is not a regular file, or unpacks to implausibly much."""
    import pyarrow.parquet

    with open_regular(path) as file:
        told = pyarrow.parquet.ParquetFile(file).metadata
        held = file.seek(0, 2)
    plausible(sum(told.row_group(i).total_byte_size for i in range(told.num_row_groups)), held)
    if told.num_rows > held:
        raise ValueError(f"it has {told.num_rows:,} rows in {held:,} bytes")


def hub(path: str, *, config: str = "", revision: str = "", **options: Any) -> Federation:
    """A data set of the Hugging Face hub by its name, the only reader that may use the network (HF_HUB_OFFLINE=1: never).

    Args:
        config: which of its configurations.
        revision: commit, branch or tag; a commit pins the bytes.
        options: those of `parquet` (image, label, site, group) and the fields of `pool.Common`.
    """
    datasets = hf_datasets()
    try:
        found = datasets.load_dataset(path, config or None, revision=revision or None)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the hub's data set {path!r} cannot be had ({reason}); check its name and the network") from error
    return _federation(path.rsplit("/", 1)[-1], found, options)


def _federation(name: str, tables: Mapping[str, Any], options: Mapping[str, Any]) -> Federation:
    """One federation of `datasets` tables by split.

    Columns: `image` and `label` (else the only ones of these types), `site` (the natural partition) and `group` where given.
    """
    options = dict(options)
    asked_for = {key: str(options.pop(key, "")) for key in ("image", "label", "site", "group")}
    asked = reader_options(options)
    datasets = hf_datasets()
    entries: list[Entry] = []
    faults: list[str] = []
    order: tuple[str, ...] = ()
    for split, table in tables.items():
        part = SPLIT_NAMES.get(split, WHOLE)
        columns = {
            key: _column(datasets, table, key, column)
            for key, column in asked_for.items()
            if column or key in ("image", "label")
        }
        kind = table.features[columns["label"]]
        table = table.cast_column(columns["image"], datasets.Image(decode=False))
        named = {key: table[column] for key, column in columns.items() if key != "image"}
        names = list(kind.names) if isinstance(kind, datasets.ClassLabel) else None
        order = tuple(names or order)
        for row, label in enumerate(named["label"]):
            if label is None or (names and not 0 <= label < len(names)):
                faults.append(f"{split}/{row}: expected a label, got {label}")
                continue
            entries.append(
                Entry(
                    f"{split}/{row}",
                    _Row(table, columns["image"], row),
                    names[label] if names else str(label),
                    str(named["site"][row]) if "site" in named else name,
                    part,
                    str(named["group"][row]) if "group" in named else "",
                )
            )
    return finished(name, entries, asked, faults, [], order)


def _column(datasets: Any, table: Any, what: str, given: str) -> str:
    known = table.column_names
    if given:
        if given not in known:
            raise InputError(f"the data have no column {given!r} for {what}{suggest(given, known)}")
        return given
    kind = datasets.Image if what == "image" else datasets.ClassLabel
    found = [what] if what in known else [name for name, each in table.features.items() if isinstance(each, kind)]
    if len(found) != 1:
        raise InputError(f"the column of the {what} was expected; set {what} to one of {', '.join(known)}")
    return found[0]


class _Row:
    """Reads the encoded picture of one row."""

    def __init__(self, table: Any, column: str, row: int) -> None:
        self._table, self._column, self._row = table, column, row

    def __call__(self) -> bytes:
        cell = self._table[self._row][self._column]
        if cell is None:
            raise OSError("the row holds no picture")
        if cell["bytes"] is not None:
            return bytes(cell["bytes"])
        return read_regular(Path(cell["path"]), MOST)
