"""Samples images of a finished run, with a site's adapter or with the run's diffusion model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..config import Config
from ..core import SamplingContext, prompts_of
from ..core.rng import stream
from ..diffusion import lora as lora
from ..tasks.denoising import Denoise
from ..utils.errors import InputError, suggest
from ..utils.files import atomic_write, check_writable
from ..utils.names import plain_name
from ..utils.paths import matching
from ..utils.settings import check_seed
from .folder import read_config, read_summary
from .generators import build_generator
from .predict import described, released
from .report_images import grid

Progress = Callable[[str, int, int], None]


def synthesize(
    folder: Path,
    *,
    site: str = "",
    labels: Sequence[str] = (),
    count: int = 8,
    seed: int = 0,
    picture: Path | None = None,
    out: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Sample `count` images of each class.

    Args:
        folder: the run folder.
        site: site of the adapter or personal model; empty: the global diffusion model, or the base without an adapter.
        labels: names of classes; empty: all.
        count: images of each class.
        seed: seed of the noise, from 0 to 2**63 - 1.
        picture: PNG to write, with a row for each class.
        out: safetensors file to write, {"image": uint8 [n, 3, h, w], "label": int64 [n]}.
        progress: progress(what, done, total).

    Returns:
        {"images", "classes", "by", and the written paths}.

    Raises:
        InputError: The run has not finished or has no generator, the site or class does not exist, or the adapter or model
            is damaged.
    """
    check_seed(seed)
    site = plain_name(site)
    config, summary = read_config(folder), read_summary(folder)
    classes, shape = described(folder, summary)
    wanted = [_label(name, classes) for name in labels] or list(range(len(classes)))
    if count < 1 or (picture is None and out is None):
        raise InputError("count must be at least 1, and --grid or --out must be set")
    if picture is not None and picture.suffix.lower() != ".png":
        raise InputError(f"--grid must end in .png; got {picture}")
    for path in (picture, out):
        if path is not None:
            check_writable(path)
    label = torch.tensor(wanted).repeat_interleave(count)
    ctx = SamplingContext(stream(seed, "synthesize", site), config.device, progress)
    if config.task == "denoise":
        task = Denoise(shape, len(classes), config.denoising)
        model = released(folder, summary, site, task)
        image = task.decoded(
            task.sample(model, label, ctx.rng, ctx.device, lambda done, total: progress("sample", done, total))
        )
        by = f"the model of {site}" if site else "the global model"
    else:
        image, by = (
            _adapted(folder, config, classes, prompts_of(site, summary.get("prompts") or ()), label, site, ctx),
            f"the adapter of {site}" if site else "the base",
        )
    place = {old: new for new, old in enumerate(wanted)}
    table = {"image": image, "label": label}
    rows = {"image": image, "label": torch.tensor([place[int(each)] for each in label])}
    if picture is not None:
        atomic_write(picture, grid(rows, len(wanted), count))
    if out is not None:
        atomic_write(out, save({name: column.contiguous() for name, column in table.items()}))
    written = {name: str(path) for name, path in (("grid", picture), ("out", out)) if path is not None}
    return {"images": len(image), "classes": [classes[each] for each in wanted], "by": by, **written}


def _label(name: str, classes: Sequence[str]) -> int:
    name = plain_name(name)
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    raise InputError(f"unknown class {name!r}{suggest(name, list(classes))}")


def _adapted(
    folder: Path,
    config: Config,
    classes: Sequence[str],
    prompts: Sequence[str],
    label: Tensor,
    site: str,
    ctx: SamplingContext,
) -> Tensor:
    files = [path.name.removesuffix(".safetensors") for path in matching(folder / "adapters", "*.safetensors")]
    kinds = (f".{lora.PROMPTS}", f".{lora.TOKENS}")  # files beside the LoRA layers, or alone without them
    sites = sorted({name.removesuffix(kinds[0]).removesuffix(kinds[1]) for name in files if not name.endswith(".concepts")})
    if not sites:
        raise InputError(
            f"the run in {folder} has no generator: {config.name} saves neither adapters nor a diffusion model, or "
            f"{folder / 'adapters'} was emptied"
        )
    if site and site not in sites:
        raise InputError(f"the run has no adapter of site {site!r}{suggest(site, sites)}")
    generator = build_generator(config.generator, config.algorithm.needs_generator)
    assert generator is not None
    if not prompts:
        raise InputError(f"{folder}/summary.json has no prompts: it is of an older version of warmfed; start a new run")
    adapter = lora.read(folder / "adapters", site) if site else None
    if adapter is not None:
        generator.check(adapter, prompts, f"the adapter of site {site!r}")
    if not {lora.PROMPTS, lora.TOKENS} & (adapter or {}).keys():  # learned ones differ, even if they began equal
        wanted = label.unique().tolist()
        generator.check_prompts([classes[each] for each in wanted], {site: [prompts[each] for each in wanted]})
    return generator.synthesize(adapter, prompts, label, ctx)
