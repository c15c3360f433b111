"""The configuration of a run: dataclasses, read from TOML and the command line, checked whole before anything starts."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import tomli_w

from .algorithms import ALGORITHMS, Smoothed, WarmFed, entry
from .core import Algorithm
from .core.admission import AdmissionPolicy
from .core.training import Training
from .diffusion.generator import LatentDiffusion
from .diffusion.networks import DenoiserSettings
from .evaluation.generators import Evaluation
from .utils.errors import InputError, suggest
from .utils.files import loads_toml, read_bytes
from .utils.settings import check_choices, construct

T = TypeVar("T")
STUDIES = ("compare", "arms", "sweep", "pretraining")
"""Tables of a file that are not of a run."""
MOST = 2**24
"""Bytes that a configuration may have."""


@dataclass(frozen=True)
class Data:
    """Which federation."""

    source: str = "digits4"
    """digits4, or how `path` is read: folder, npz, idx, csv, camelyon17, parquet, hub; without `path`: a path itself."""
    path: str = ""
    """What is read; for hub, the data set's name."""
    cache: str = ""
    """Folder where decoded images are kept; empty: $WARMFED_CACHE, or warmfed in the user's cache folder."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What its reader takes: image_size, classes, deal, …; see docs/data.md."""


@dataclass(frozen=True)
class Model:
    """The classifier."""

    name: str = "cnn"
    """A network of `warmfed.models`."""
    start: str = ""
    """What it starts from: nothing (random weights), public (trained on the base's public data), or a safetensors file."""


@dataclass(frozen=True)
class Holdout:
    """A site that takes no part. At the end it joins late: it is sent the global model, and tunes it alone."""

    site: str = ""
    """Its name; empty: every site takes part."""
    training: Training = Training(lr=0.005, epochs=5, max_grad_norm=1.0)
    """How it tunes the global model, in every algorithm alike."""


@dataclass(frozen=True)
class Config:
    """One run, resolved: every value that it used is in here."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "border": "server",
        "measuring": "evaluation",
        "unseen": "holdout",
        "smooth": "global_ema_decay",
    }

    name: str = "warmfed"
    """The algorithm, by its name on the command line."""
    algorithm: Algorithm = field(default_factory=WarmFed)
    """Its hyper-parameters."""
    global_ema_decay: float = 0.0
    """Decay of a moving average of the global model over the rounds, which is released in its place; 0: none."""
    seed: int = 0
    """Names every random number of the run."""
    data: Data = Data()
    model: Model = Model()
    task: Literal["classify", "denoise"] = "classify"
    """What is learned: classify, or denoise (a diffusion model of the images)."""
    denoising: DenoiserSettings = DenoiserSettings()
    """The diffusion model, where it is learned."""
    evaluation: Evaluation = Evaluation()
    """How it is measured."""
    holdout: Holdout = Holdout()
    generator: LatentDiffusion = field(default_factory=LatentDiffusion)
    server: AdmissionPolicy = AdmissionPolicy()
    """What is taken from the sites."""
    workers: int = 2
    """Processes that work at the same time; the results do not depend on it."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cpu, or cuda for one process with a graphics card."""
    evaluate: Literal["every", "last", "never"] = "every"
    """When the models are measured: every (stage), last or never."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.global_ema_decay < 1:
            raise InputError(f"global_ema_decay must be from 0 to below 1; got {self.global_ema_decay}")

    @property
    def method(self) -> Algorithm:
        """The algorithm as the server runs it."""
        return Smoothed(self.algorithm, self.global_ema_decay) if self.global_ema_decay else self.algorithm

    def toml(self) -> str:
        algorithm = {"name": self.name, **_plain(self.algorithm)}
        rest = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in ("name", "algorithm")}
        return tomli_w.dumps({"algorithm": algorithm, **rest})


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return dict(value) if isinstance(value, Mapping) else value


def parse(file: Path | None = None, settings: Mapping[str, Any] | None = None) -> Config:
    """A configuration from a TOML file (or none) under `settings`, whose keys are dotted: {"algorithm.rounds": 1}.

    What the file says of comparisons, sweeps and pre-training (`STUDIES`) is left to those.

    Raises:
        InputError: an unknown key (with the nearest known one), a wrong type, a value out of range.
    """
    tables = read_toml(file) if file is not None else {}
    shared = {key: value for key, value in tables.items() if key not in STUDIES}
    return resolve(shared, nested(settings or {}))


def data_table(file: Path | None = None, settings: Mapping[str, Any] | None = None) -> Data:
    """The table `data` of a configuration alone: `warmfed data` needs no other. Raises as `parse` does."""
    tables = read_toml(file) if file is not None else {}
    _overlay(tables, nested(settings or {}))
    return construct(Data, _table(tables, "data"), "data")


def pretraining_tables(file: Path | None, settings: Mapping[str, Any]) -> tuple[Data | None, dict[str, Any]]:
    """What `warmfed pretrain` needs of a file: its table `data` (None: there is none) and its table `pretraining`.

    Args:
        settings: of pre-training by their plain names, and those of the data ("data.path").
    """
    tables = read_toml(file) if file is not None else {}
    asked = nested(settings)
    data, made = _table(tables, "data"), _table(tables, "pretraining")
    _overlay(data, _table(asked, "data"))
    _overlay(made, {key: value for key, value in asked.items() if key != "data"})
    return construct(Data, data, "data") if data else None, made


def _table(tables: Mapping[str, Any], name: str) -> dict[str, Any]:
    values = tables.get(name, {})
    if not isinstance(values, Mapping):
        raise InputError(f"{name} must be a table of settings; got {values!r}")
    return dict(values)


def read_toml(file: Path) -> dict[str, Any]:
    """The tables of a TOML file; raises `InputError`."""
    try:
        return loads_toml(read_bytes(file, "the configuration", MOST))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{file} is not TOML: {error}; correct it") from error


def resolve(*layers: Mapping[str, Any]) -> Config:
    """A configuration from nested tables, later ones above earlier ones, over what belongs to the algorithm's name."""
    merged: dict[str, Any] = {}
    for layer in layers:
        _overlay(merged, layer)
    table = merged.setdefault("algorithm", {})
    if not isinstance(table, dict):
        raise InputError(f'algorithm must be a table; write algorithm.name = "{table}"')
    presets = nested(entry(str(table.setdefault("name", "warmfed"))).settings)
    _overlay(presets, merged)
    return build(presets)


def build(values: dict[str, Any]) -> Config:
    """A configuration from nested tables, as a resolved `config.toml` holds them."""
    values = dict(values)
    table = values.pop("algorithm", {})
    if not isinstance(table, dict):
        raise InputError(f'algorithm must be a table; write algorithm.name = "{table}"')
    table = dict(table)
    name = str(table.pop("name", "warmfed"))
    for key in table.keys() - _fields(entry(name).cls):
        if owners := [other for other, each in ALGORITHMS.items() if key in _fields(each.cls)]:
            raise InputError(f"{name} has no setting algorithm.{key}; take it out, or choose one that has: {', '.join(owners)}")
    known = {f.name for f in dataclasses.fields(Config)} - {"name"}
    for key in values:
        if key in Config.RENAMED:
            raise InputError(f"{key} is now called {Config.RENAMED[key]}; rename it")
        if key not in known:
            raise InputError(f"unknown key {key!r}{suggest(key, sorted(known))}")
    algorithm: Any = construct(entry(name).cls, table, "algorithm")
    rest = construct(Config, {**values, "name": name}, "", skip=("algorithm",))
    return dataclasses.replace(rest, algorithm=algorithm)


def _fields(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def setting(text: str) -> tuple[str, Any]:
    """One `key=value` of the command line; the value is read as TOML, and as text where it is none."""
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set takes key=value; got {text!r}")
    try:
        return key.strip(), loads_toml(f"value = {raw}")["value"]
    except ValueError:
        return key.strip(), raw


def choices(text: str) -> tuple[str, list[Any]]:
    """One `key=a,b,c` of the command line: the values that a sweep tries."""
    key, _, raw = text.partition("=")
    values = setting(f"{key}=[{raw}]" if not raw.strip().startswith("[") else text)[1] if raw else text
    return key.strip(), values if isinstance(values, list) else [part.strip() for part in raw.split(",") if part.strip()]


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of dotted keys: {"model.name": "cnn"} is {"model": {"name": "cnn"}}."""
    tables: dict[str, Any] = {}
    for key, value in flat.items():
        _overlay(tables, _chain(key.split("."), value))
    return tables


def _chain(keys: list[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _chain(keys[1:], value) if keys[1:] else value}


def _overlay(under: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, Mapping):
            if not isinstance(under.get(key), dict):
                under[key] = {}
            _overlay(under[key], value)  # never a table of `over` itself: what is laid on it later would change that, too
        else:
            under[key] = value
