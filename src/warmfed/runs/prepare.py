"""Prepares a run: loads and checks its data, task, base and start before anything is written."""

import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..algorithms import ALGORITHMS, entry
from ..config import Config, Data
from ..core import Algorithm, Generator, Task, prompts_of
from ..data import Federation, FederationInfo, Site, load
from ..diffusion import known_pipelines, pipeline
from ..diffusion.concept_inversion import Concepts
from ..diffusion.generator import LatentDiffusion
from ..evaluation import generators
from ..tasks import Classify
from ..tasks.classification import network_of
from ..tasks.denoising import Denoise
from ..transports.client import Client
from ..utils.errors import InputError, suggest
from ..utils.files import read_bytes
from ..utils.paths import is_file
from .generators import build_generator


@dataclass(frozen=True)
class PreparedRun:
    """A configuration with its data, task, base and start, loaded and checked."""

    config: Config
    federation: Federation | FederationInfo
    """The participating sites."""
    holdout: Site | None
    """The held-out site, or None."""
    task: Classify | Denoise
    base: str
    """SHA-256 of the generator's base; empty if the algorithm uses none."""
    start: str
    """SHA-256 of the file with the initial weights, with that of the network's frozen part; empty if there is neither."""

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of settings (of [server], only max_weight_share; without workers), data, base and start."""
        values = tomllib.loads(self.config.toml())
        del values["workers"]
        if (share := values.pop("server")["max_weight_share"]) != 1:
            values["max_weight_share"] = share
        del values["data"]["cache"]  # does not change results
        text = json.dumps([values, self.federation.fingerprint, self.base, self.start], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def images(self) -> Federation:
        """Return the federation with its images; only if they are on this machine."""
        assert isinstance(self.federation, Federation)
        return self.federation

    @property
    def generator(self) -> LatentDiffusion | Concepts | None:
        """Return the generator that the algorithm needs, or None."""
        return build_generator(self.config.generator, self.config.algorithm.needs_generator)

    def workers(self) -> dict[str, Client]:
        """Return a client for each site; only if the images are on this machine."""
        config = self.config
        return clients_of(config.algorithm, self.images, self.task, config.seed, self.generator, config.device)


def clients_of(
    algorithm: Algorithm, federation: Federation, task: Task, seed: int, generator: Generator | None, device: str
) -> dict[str, Client]:
    """Return a client for each site of a federation."""
    return {
        name: Client(name, algorithm, task, task.tables(site.splits), seed, federation.prompts, generator, device)
        for name, site in federation.sites.items()
    }


def load_data(data: Data) -> Federation:
    """Return the federation of a configuration; raise `InputError` if it cannot be loaded."""
    return load(data.source, data.path, **({"cache": data.cache} if data.cache else {}), **data.options)


def prepare(config: Config, federation: Federation | FederationInfo | None = None, *, weights: bool = True) -> PreparedRun:
    """Load and check all inputs of a run; write nothing.

    Args:
        config: the configuration.
        federation: the configuration's federation with all sites, if it is loaded already.
        weights: whether the weights of base and start are required and hashed (gigabytes for Stable Diffusion). If False,
            both count as unused.

    Raises:
        InputError: A setting, the data, the base or the start is not valid.
    """
    if config.workers < 1:
        raise InputError(f"workers must be at least 1; got {config.workers}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, but torch finds no GPU; set device to cpu")
    plan = config.algorithm.stages()
    if not plan or config.algorithm.rounds < 0:
        raise InputError(f"{config.name} has no stages in {config.algorithm.rounds} rounds; increase rounds")
    for stage in plan:
        if not 0 < stage.client_fraction <= 1:
            raise InputError(f"client_fraction must be more than 0 and at most 1; got {stage.client_fraction}")
    if config.task not in entry(config.name).tasks:
        able = ", ".join(name for name, each in ALGORITHMS.items() if config.task in each.tasks)
        raise InputError(f"{config.name} cannot learn the task {config.task}; choose one of {able}")
    federation = federation or load_data(config.data)
    holdout = None
    if config.holdout.site:
        if isinstance(federation, FederationInfo):
            raise InputError("holdout.site is for runs on one machine only; remove it from the configuration")
        federation, holdout = federation.without(config.holdout.site), federation.sites[config.holdout.site]
    size = federation.shape, len(federation.classes)
    task: Classify | Denoise
    if config.task == "denoise":
        start = start_file(config)
        task = Denoise(*size, config.denoising, start)
    else:
        task = classification(config, *size)
        start = task.start
    try:
        task.probe(torch.zeros(1, *federation.shape, dtype=torch.uint8))
    except RuntimeError as error:
        raise InputError(
            f"model {config.model.network!r} does not take images of {federation.shape} ({error}); choose another"
        ) from error
    generator = build_generator(config.generator, config.algorithm.needs_generator)
    uses = generator is not None
    if uses and federation.shape[0] != 3:
        raise InputError(
            f"{config.generator.base} generates colour images, those of {federation.name} are grey; set channels to 3"
        )
    side = config.generator.size or known_pipelines.side(config.generator.base) if uses else 0
    if uses and federation.shape[1:] != (side, side):
        raise InputError(
            f"{config.generator.base} generates images of {side}×{side} pixels, those of {federation.name} have "
            f"{federation.shape[1]}×{federation.shape[2]}; set data.options.image_size={side} or generator.size"
        )
    config.algorithm.check_sites(len(federation.rows))
    if generator is not None:
        generator.check_settings()
        generator.check_prompts(federation.classes, {site: prompts_of(site, federation.prompts) for site in federation.rows})
        _adapters(generator, config, federation, weights)
    drawn = config.task == "denoise"
    if isinstance(federation, Federation) and (uses or drawn):
        base = (config.denoising.latent or "digits") if drawn else config.generator.base
        generators.check(config.evaluation, base, federation, drawn=drawn, weights=weights)
    return PreparedRun(
        config,
        federation,
        holdout,
        task,
        base=pipeline.fingerprint(config.generator.base) if uses and weights else "",
        start=_start_digest(start, task) if weights else "",
    )


def classification(config: Config, shape: tuple[int, int, int], classes: int) -> Classify:
    """Return the task of a configuration for images of this shape; raise `InputError` as `start_file` does."""
    model = config.model
    return Classify(shape, classes, model.network, start_file(config), model.trainable, model.statistics)


def _start_digest(start: str, task: Classify | Denoise) -> str:
    """Return the SHA-256 of the file with the initial weights, with that of the frozen part of the network."""
    digest = hashlib.sha256(read_bytes(Path(start), "the classifier to start from")).hexdigest() if start else ""
    frozen = task.frozen_digest() if isinstance(task, Classify) else ""
    return hashlib.sha256((digest + frozen).encode()).hexdigest() if frozen else digest


def start_file(config: Config) -> str:
    """Return the file of the initial weights; empty: random weights.

    Raises:
        InputError: The base is not found, its public classifier is damaged, or a denoiser would start from it.
    """
    start = config.model.start
    if start not in ("public", "auto"):
        return start
    if config.task == "denoise":
        raise InputError("a denoiser cannot start from the public classifier; set model.start to a file, or leave it empty")
    if start == "public":
        return str(pipeline.find(config.generator.base) / pipeline.PUBLIC_CLASSIFIER)
    path = pipeline.folder_of(config.generator.base) / pipeline.PUBLIC_CLASSIFIER
    return str(path) if is_file(path) and network_of(path, "the public classifier") == config.model.network else ""


def _adapters(generator: Any, config: Config, federation: Federation | FederationInfo, weights: bool) -> None:
    """Raise `InputError` if an imported adapter has an unknown site, is missing or, with `weights`, does not fit."""
    for site in config.generator.adapters:
        if site not in federation.rows:
            raise InputError(f"generator.adapters names the site {site!r}{suggest(site, list(federation.rows))}")
        read_bytes(Path(config.generator.adapters[site]), f"the adapter of site {site!r}")
        if weights:
            generator.imported(site, prompts_of(site, federation.prompts))
