"""Lists all files that a run reads, with size and SHA-256, before it starts: for sites without a network."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..config import Config
from ..diffusion import known_pipelines, pipeline
from ..utils.errors import InputError
from ..utils.paths import is_file, is_folder, matching
from .prepare import start_file

_BLOCK = 2**24


@dataclass(frozen=True)
class File:
    """A file or folder that a run reads."""

    what: str
    path: str
    bytes: int = 0
    """Size in bytes; of a folder, the sum over its files."""
    sha256: str = ""
    """SHA-256; of a folder, over names and contents. Empty if missing."""
    note: str = ""
    """Advice for a missing file."""

    @property
    def there(self) -> bool:
        return bool(self.sha256)


def examine(config: Config) -> list[File]:
    """Return the files that a run of this configuration reads, without the package's own; raise `InputError` if unreadable."""
    return [*_base(config), *_classifier(config), *_data(config)]


def _base(config: Config) -> Iterator[File]:
    names: dict[str, None] = {}
    uses = config.algorithm.needs_generator is not None
    if uses:
        names[config.generator.base] = None
        for site, path in config.generator.adapters.items():
            yield _file(f"adapter of {site}", Path(path), "restore it, or remove it from generator.adapters")
    if config.task == "denoise" and config.denoising.latent:
        names[config.denoising.latent] = None
    for base in names:
        advice = pipeline.advice(base)
        found = pipeline.files(base)
        if not is_file(found["model_index.json"]):
            yield from _expected(base, found["model_index.json"].parent, advice)
            continue
        for name, path in found.items():
            yield _file(f"base {base}: {name}", path, advice)


def _expected(base: str, folder: Path, advice: str) -> Iterator[File]:
    """Yield the files of a missing base."""
    try:
        kind, made = known_pipelines.outline(base)
    except InputError:
        yield File(f"base {base}: model_index.json", str(folder / "model_index.json"), note=advice)
        return
    for part in ("", *kind.parts):
        name = "model_index.json" if not part else f"{part}/"
        if part in kind.models:
            name = f"{part}/{pipeline.WEIGHTS[made[part][0]]}.safetensors"
        yield File(f"base {base}: {name}", str(folder / name), note=advice)


def _classifier(config: Config) -> Iterator[File]:
    public = pipeline.folder_of(config.generator.base) / pipeline.PUBLIC_CLASSIFIER
    if start := str(public) if config.model.start == "public" else start_file(config):
        yield _file("classifier to start from", Path(start), "restore it, or leave model.start empty")
    if config.task == "denoise" and config.evaluation.samples:
        path = public if config.evaluation.features == "public" else Path(config.evaluation.features)
        yield _file("features for the evaluation of samples", path, "restore it, or set evaluation.features")


def _data(config: Config) -> Iterator[File]:
    source, path = config.data.source, config.data.path
    if source == "digits4":
        return  # the package renders them
    if source == "hub":
        yield File("data of the hub", path, note=f"download it with `warmfed data --set data.source=hub data.path={path}`")
        return
    if source in _READERS and not path:
        yield File("data", "", note=f"data.source is {source} and data.path is empty: set it with --set data.path=…")
        return
    yield _file("data", Path(path or source), "check data.path")
    lists = config.data.options.get("lists")
    if isinstance(lists, str):
        yield _file("lists of the splits", Path(lists), "check data.options.lists")


_READERS = ("folder", "npz", "idx", "csv", "camelyon17", "parquet")


def _file(what: str, path: Path, advice: str) -> File:
    if is_folder(path):
        files = sorted(each for each in matching(path, "*", below=True) if is_file(each))
        total = hashlib.sha256()
        for each in files:
            total.update(f"{each.relative_to(path).as_posix()}:{each.stat().st_size}:{_digest(each)};".encode())
        size = sum(each.stat().st_size for each in files)
        return File(
            f"{what} ({len(files):,} files)", str(path), size, total.hexdigest() if files else "", "" if files else advice
        )
    if not is_file(path):
        return File(what, str(path), note=advice)
    return File(what, str(path), path.stat().st_size, _digest(path))


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                found.update(block)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    return found.hexdigest()
