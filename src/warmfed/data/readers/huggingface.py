"""Readers that use Hugging Face `datasets` (extra "data"): Parquet files, saved data sets and the hub."""

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...utils.errors import InputError, suggest
from ...utils.files import make_folder, open_regular, read_regular
from ...utils.paths import expanded, is_file, is_folder, matching
from ..build import finished
from ..decode import Entry
from ..examples import WHOLE, Names, ReaderOptions, reader_options
from ..extras import hf_datasets
from ..federation import SPLIT_NAMES, Federation
from ..image_io import MOST
from .archives import plausible


def parquet(path: str | Path, **options: Any) -> Federation:
    """Return the federation in Parquet files or a folder of `Dataset.save_to_disk`, without network access.

    Files named train-*, validation-* or test-* are these splits.

    Args:
        path: a Parquet file, a folder of them, a pattern, or a folder of `Dataset.save_to_disk`.
        options: the names of columns (image, label, site, group) and the fields of `ReaderOptions`.

    Raises:
        InputError: if the files are missing, damaged or not one table.
    """
    datasets, where = hf_datasets(), expanded(path)
    if is_file(where / "dataset_info.json") or is_file(where / "dataset_dict.json"):
        try:
            for file in matching(where, "*", below=True):
                if not is_folder(file):
                    open_regular(file).close()
            found = datasets.load_from_disk(str(where))
        except (OSError, ValueError) as error:
            raise InputError(f"the data set saved in {where} is damaged ({error}); save it again") from error
        return _federation(where.stem, found if isinstance(found, Mapping) else {WHOLE: found}, options)
    files = (
        matching(where, "*.parquet", below=True) if is_folder(where) else [Path(each) for each in sorted(glob.glob(str(where)))]
    )
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
        except (OSError, ValueError, TypeError, KeyError, AttributeError, datasets.exceptions.DatasetGenerationError) as error:
            # a file may hold any metadata for `datasets`
            reason = str(error.__cause__ or error).splitlines()[0]
            raise InputError(f"the Parquet files at {where} do not read as one table ({reason}); check them") from error
    return _federation(where.stem, tables, options)


def _prepared(options: Mapping[str, Any]) -> str:
    """Return the private folder of the tables that `datasets` makes from Parquet files; they hold a site's images."""
    folder = ReaderOptions(cache=options.get("cache")).store.folder / "tables"
    try:
        make_folder(folder)
    except OSError as error:
        raise InputError(f"cannot make {folder}: {error.strerror}; set data.cache to another folder") from error
    return str(folder)


def _sound(path: Path) -> None:
    """Raise `OSError` or `ValueError` if a Parquet file is not a regular file, or its unpacked size is implausible."""
    import pyarrow.parquet

    with open_regular(path) as file:
        metadata = pyarrow.parquet.ParquetFile(file).metadata
        held = file.seek(0, 2)
    plausible(sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)), held)
    if metadata.num_rows > held:
        raise ValueError(f"it has {metadata.num_rows:,} rows in {held:,} bytes")


def hub(path: str, *, config: str = "", revision: str = "", **options: Any) -> Federation:
    """Return a data set of the Hugging Face hub.

    Only this reader may use the network; with HF_HUB_OFFLINE=1 it does not.

    Args:
        path: name of the data set.
        config: its configuration; empty: the default one.
        revision: commit, branch or tag; only a commit fixes the bytes.
        options: those of `parquet`.

    Raises:
        InputError: if the data set cannot be loaded.
    """
    datasets = hf_datasets()
    try:
        found = datasets.load_dataset(path, config or None, revision=revision or None)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot load the data set {path!r} of the hub ({reason}); check its name and the network") from error
    return _federation(path.rsplit("/", 1)[-1], found, options)


def _federation(name: str, tables: Mapping[str, Any], options: Mapping[str, Any]) -> Federation:
    """Return the federation of `datasets` tables by split.

    The columns are `image` and `label` (by default the only ones of these types), `site` and `group`, if set.
    """
    options = dict(options)
    notes: list[str] = []
    read, sites = Names(notes), set()
    chosen = {key: str(options.pop(key, "")) for key in ("image", "label", "site", "group")}
    common = reader_options(options)
    datasets = hf_datasets()
    entries: list[Entry] = []
    faults: list[str] = []
    order: tuple[str, ...] = ()
    for split, table in tables.items():
        part = SPLIT_NAMES.get(split, WHOLE)
        columns = {
            key: _column(datasets, table, key, column) for key, column in chosen.items() if column or key in ("image", "label")
        }
        table = _with_pictures(datasets, table, columns["image"])
        cells = {key: _texts(datasets, table, column) for key, column in columns.items() if key != "image"}
        kind = table.features[columns["label"]]
        order = tuple(map(read, kind.names)) if isinstance(kind, datasets.ClassLabel) else order
        for row, label in enumerate(cells["label"]):
            where, site = f"{split}/{row}", read(cells["site"][row] if "site" in cells else name)
            sites |= {site} - {""}
            if common.sites is not None and site not in common.sites:
                continue
            if not site or not label:
                faults.append(
                    f"{where}: expected a label and a site, texts or whole numbers; a cell is empty or of another type"
                )
                continue
            group = cells["group"][row] if "group" in cells else ""
            entries.append(Entry(where, _Row(table, columns["image"], row), read(label), site, part, group))
    return finished(name, entries, common, faults, notes, order, sites)


def _with_pictures(datasets: Any, table: Any, column: str) -> Any:
    """Return the table with undecoded pictures in a column; raise `InputError` if it cannot hold pictures."""
    try:
        return table.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's errors are of these types
        kind = getattr(table.features[column], "dtype", type(table.features[column]).__name__)
        raise InputError(f"column {column!r} has no pictures ({kind}); set the option image to the column that has") from error


def _texts(datasets: Any, table: Any, column: str) -> list[str]:
    """Return the cells of a column as texts; "" if a cell is missing, not a number, or of another type.

    A class's number becomes its name. pandas stores whole numbers as floats if a cell is missing: 2.0 becomes "2".
    """
    kind = table.features[column]
    names = kind.names if isinstance(kind, datasets.ClassLabel) else None

    def text(cell: Any) -> str:
        if isinstance(cell, float) and cell.is_integer():
            cell = int(cell)
        if names is not None:
            return str(names[cell]) if isinstance(cell, int) and 0 <= cell < len(names) else ""
        return str(cell).strip() if isinstance(cell, str | int) else ""

    return [text(cell) for cell in table[column]]


def _column(datasets: Any, table: Any, what: str, given: str) -> str:
    known = table.column_names
    if given:
        if given not in known:
            raise InputError(f"the data have no column {given!r} for {what}{suggest(given, known)}")
        return given
    kind = datasets.Image if what == "image" else datasets.ClassLabel
    found = [what] if what in known else [name for name, each in table.features.items() if isinstance(each, kind)]
    if len(found) != 1:
        raise InputError(f"cannot identify the column of the {what}; set {what} to one of {', '.join(known)}")
    return found[0]


class _Row:
    """Function that returns the encoded picture of one row."""

    def __init__(self, table: Any, column: str, row: int) -> None:
        self._table, self._column, self._row = table, column, row

    def __call__(self) -> bytes:
        cell = self._table[self._row][self._column]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise OSError("the row has no picture")
        if cell["bytes"] is not None:
            return bytes(cell["bytes"])
        return read_regular(Path(cell["path"]), MOST)
