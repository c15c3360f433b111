"""Configuration of a run: dataclasses, read from TOML and the command line, and checked before the run starts."""

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
from .models import BACKBONE, check_trainable
from .utils.errors import InputError
from .utils.files import loads_toml, read_bytes
from .utils.names import plain_name
from .utils.paths import exists, expanded
from .utils.settings import check_choices, check_key, check_seed, construct, demand_texts

T = TypeVar("T")
STUDIES = ("compare", "arms", "sweep", "pretraining")
"""Tables of a configuration file that are not part of a run."""
MOST = 2**24
"""Largest configuration file in bytes."""


@dataclass(frozen=True)
class Data:
    """Settings of `[data]`: the federation."""

    source: str = "digits4"
    """Source of the images. Default digits4.

    With `path`, it is the format: folder, npz, idx, csv, camelyon17, parquet or hub. Without `path`, it may be a path."""
    path: str = ""
    """File or folder to read; for hub, the name of the data set. Default empty."""
    cache: str = ""
    """Folder of decoded images. Default empty: $WARMFED_CACHE, or warmfed in the user's cache folder."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the reader: image_size, classes, partition, …; see docs/data.md."""


@dataclass(frozen=True)
class Model:
    """Settings of `[model]`: the classifier."""

    name: str = "cnn"
    """Network: cnn (default), linear, pfllib-cnn, resnet18, or one of your own, python:package.module:function."""
    backbone: str = ""
    """Pretrained vision model of transformers instead: its folder, with safetensors. Default empty."""
    start: str = ""
    """Initial weights: empty (random, the default), public (trained on the base's public data), auto, or a safetensors file.

    auto is public if the base has a public classifier of this network, and random otherwise."""
    trainable: str = "all"
    """Part that is trained, sent and stored: all (default), head, lora, or last:N (N layers and the head)."""
    buffers: Literal["auto", "averaged", "frozen"] = "auto"
    """Running statistics of normalisation layers: averaged, frozen, or auto (default: frozen with `backbone`)."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_trainable(self.trainable)
        if self.backbone and self.name != "cnn":
            raise InputError(f"model.name is {self.name!r} beside model.backbone; remove one of them")

    @property
    def network(self) -> str:
        """Name of the network for `warmfed.models.network`."""
        return f"{BACKBONE}{self.backbone}" if self.backbone else self.name

    @property
    def statistics(self) -> Literal["averaged", "frozen"]:
        """Policy of the running statistics."""
        return self.buffers if self.buffers != "auto" else "frozen" if self.backbone else "averaged"


@dataclass(frozen=True)
class Holdout:
    """Settings of `[holdout]`: a site that takes no part in the run. At the end it fine-tunes the global model alone."""

    site: str = ""
    """Name of the held-out site. Default empty: every site takes part."""
    training: Training = Training(lr=0.005, epochs=5, max_grad_norm=1.0)
    """Fine-tuning of the global model at the held-out site, equal for all algorithms."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "site", plain_name(self.site))


@dataclass(frozen=True)
class Config:
    """Resolved configuration of one run: it holds the value of every setting."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "border": "server",
        "measuring": "evaluation",
        "unseen": "holdout",
        "smooth": "global_ema_decay",
    }

    name: str = "warmfed"
    """Name of the algorithm. Default warmfed."""
    algorithm: Algorithm = field(default_factory=WarmFed)
    """Hyper-parameters of the algorithm."""
    global_ema_decay: float = 0.0
    """Decay of a moving average that replaces the global model after each round, from 0 to below 1. Default 0: none."""
    seed: int = 0
    """Seed of all random streams, from 0 to 2**63 - 1. Default 0."""
    data: Data = Data()
    model: Model = Model()
    task: Literal["classify", "denoise"] = "classify"
    """Task: classify (default), or denoise (a diffusion model of the images)."""
    denoising: DenoiserSettings = DenoiserSettings()
    """Diffusion model of the task denoise."""
    evaluation: Evaluation = Evaluation()
    """Evaluation of generators."""
    holdout: Holdout = Holdout()
    generator: LatentDiffusion = field(default_factory=LatentDiffusion)
    server: AdmissionPolicy = AdmissionPolicy()
    """Admission policy of the server."""
    workers: int = 2
    """Number of worker processes; results do not depend on it. Default 2."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device: cpu (default), or cuda for one process with a GPU."""
    evaluate: Literal["every", "last", "never"] = "every"
    """Stages after which the models are evaluated: every (default), last or never."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_seed(self.seed)
        if not 0 <= self.global_ema_decay < 1:
            raise InputError(f"global_ema_decay must be from 0 to below 1; got {self.global_ema_decay}")

    @property
    def method(self) -> Algorithm:
        """Return the algorithm that the server runs, with `global_ema_decay` applied."""
        return Smoothed(self.algorithm, self.global_ema_decay) if self.global_ema_decay else self.algorithm

    def toml(self) -> str:
        algorithm = {"name": self.name, **_plain(self.algorithm)}
        rest = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in ("name", "algorithm")}
        tables = {"algorithm": algorithm, **rest}
        for key, table in tables.items():
            demand_texts(table, key)  # the folder that relative paths start from may have another encoding
        return tomli_w.dumps(tables)


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with absolute paths, so that a run can be resumed from any folder.

    Names (an embedded base, a data set of the hub) stay as they are.
    """

    def whole(path: Any) -> Any:
        return str(expanded(path).absolute()) if path and isinstance(path, str) else path

    def whole_if_there(path: str) -> str:
        return str(expanded(path).absolute()) if path and exists(expanded(path)) else path

    data, generator = config.data, config.generator
    reader, colon, rest = data.source.partition(":")
    options = dict(data.options)
    for key in ("root", "lists", "cache"):
        if options.get(key) not in (None, "off"):
            options[key] = whole(options[key])
    if isinstance(partition := options.get("partition"), Mapping) and "path" in partition:
        options["partition"] = {**partition, "path": whole(partition["path"])}
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            data,
            source=f"{reader}:{whole_if_there(rest)}" if colon and rest else whole_if_there(data.source),
            path=data.path if data.source == "hub" else whole(data.path),
            cache=whole(data.cache),
            options=options,
        ),
        generator=dataclasses.replace(
            generator,
            base=whole_if_there(generator.base),
            adapters={site: whole(path) for site, path in generator.adapters.items()},
        ),
        model=dataclasses.replace(
            config.model, start=whole_if_there(config.model.start), backbone=whole_if_there(config.model.backbone)
        ),
        evaluation=dataclasses.replace(config.evaluation, features=whole_if_there(config.evaluation.features)),
    )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return dict(value) if isinstance(value, Mapping) else value


def parse(file: Path | None = None, settings: Mapping[str, Any] | None = None) -> Config:
    """Return the configuration of a TOML file (or of the defaults), overridden by `settings`.

    The tables of comparisons, sweeps and pre-training (`STUDIES`) are ignored.

    Args:
        file: the TOML file, or None.
        settings: values by dotted key: {"algorithm.rounds": 1}.

    Raises:
        InputError: A key is unknown, a type is wrong, or a value is out of range.
    """
    tables = read_toml(file) if file is not None else {}
    shared = {key: value for key, value in tables.items() if key not in STUDIES}
    return resolve(shared, nested(settings or {}))


def data_table(file: Path | None = None, settings: Mapping[str, Any] | None = None) -> Data:
    """Return the table `data` of a configuration, for `warmfed data`; raise as `parse` does."""
    tables = read_toml(file) if file is not None else {}
    _overlay(tables, nested(settings or {}))
    return construct(Data, _table(tables, "data"), "data")


def pretraining_tables(file: Path | None, settings: Mapping[str, Any]) -> tuple[Data | None, dict[str, Any]]:
    """Return the tables `data` (None if missing) and `pretraining` of a file, for `warmfed pretrain`.

    Args:
        settings: overriding values; settings of pre-training by name, those of the data by dotted key ("data.path").
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
    """Return the tables of a TOML file; raise `InputError` if it cannot be read or is not TOML."""
    try:
        return loads_toml(read_bytes(file, "the configuration", MOST))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{file} is not TOML: {error}; correct it") from error


def resolve(*layers: Mapping[str, Any]) -> Config:
    """Return the configuration of nested tables; later tables override earlier ones, and all override the presets."""
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
    """Return the configuration of nested tables, as in a resolved `config.toml`."""
    values = dict(values)
    table = values.pop("algorithm", {})
    if not isinstance(table, dict):
        raise InputError(f'algorithm must be a table; write algorithm.name = "{table}"')
    table = dict(table)
    name = str(table.pop("name", "warmfed"))
    for key in table.keys() - _fields(entry(name).cls):
        if owners := [other for other, each in ALGORITHMS.items() if key in _fields(each.cls)]:
            raise InputError(f"{name} has no setting algorithm.{key}; remove it, or choose one that has: {', '.join(owners)}")
    known = {f.name for f in dataclasses.fields(Config)} - {"name"}
    for key in values:
        check_key(key, "", known, Config.RENAMED)
    algorithm: Any = construct(entry(name).cls, table, "algorithm")
    rest = construct(Config, {**values, "name": name}, "", skip=("algorithm",))
    return dataclasses.replace(rest, algorithm=algorithm)


def _fields(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def setting(text: str) -> tuple[str, Any]:
    """Return key and value of `key=value`; the value is parsed as TOML, or is text if it is not TOML."""
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set takes key=value; got {text!r}")
    try:
        return key.strip(), loads_toml(f"value = {raw}")["value"]
    except ValueError:
        return key.strip(), raw


def choices(text: str) -> tuple[str, list[Any]]:
    """Return key and values of `key=a,b,c`, for a sweep."""
    key, _, raw = text.partition("=")
    values = setting(f"{key}=[{raw}]" if not raw.strip().startswith("[") else text)[1] if raw else text
    return key.strip(), values if isinstance(values, list) else [part.strip() for part in raw.split(",") if part.strip()]


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested tables of dotted keys: {"model.name": "cnn"} becomes {"model": {"name": "cnn"}}."""
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
            _overlay(under[key], value)  # copies: a later overlay must not change a table of `over`
        else:
            under[key] = value
