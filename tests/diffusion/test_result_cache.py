"""The result cache: shared work of a comparison runs once, and its results are those without a cache."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from warmfed.core import ClientContext, ServerContext
from warmfed.core.rng import stream
from warmfed.core.tensors import sha256
from warmfed.core.training import Training
from warmfed.diffusion.generator import LatentDiffusion
from warmfed.diffusion.networks import DenoiserSettings
from warmfed.diffusion.result_cache import CachedGenerator
from warmfed.diffusion.settings import Lora
from warmfed.tasks.denoising import Denoise
from warmfed.utils.errors import InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from warmfed.diffusion import pipeline
    from warmfed.pretraining.pretrain import Pretraining, build

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
PROMPTS = ("zero", "one")
LABELS = torch.tensor([0, 1, 1])


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    folder = tmp_path_factory.mktemp("base") / "base"
    pipeline.save(build(Pretraining(channels=4, decoder_width=8, widths=(16, 32), text_width=16, text_layers=1)), folder)
    return LatentDiffusion(str(folder), steps=2, views=1, training=Training(optimizer="adamw", lr=1e-2, steps=2, batch_size=4))


def at_site(seed: int = 0) -> ClientContext:
    table = {"image": torch.randint(256, (6, 3, 32, 32), generator=stream("once"), dtype=torch.uint8)}
    table["label"] = torch.arange(6) % 2
    return ClientContext(None, {"train": table}, stream("site", seed), "a", PROMPTS)


def test_what_is_found_is_what_would_have_been_made(generator: LatentDiffusion, tmp_path: Path) -> None:
    once = CachedGenerator(generator, tmp_path)
    seen = []
    for adapting in (generator, once, once):
        ctx, server = at_site(), ServerContext(None, stream("server"))
        adapter, metrics = adapting.adapt(ctx)
        images = adapting.synthesize(adapter, PROMPTS, LABELS, server)
        bare = adapting.synthesize(None, PROMPTS, LABELS, server)
        states = {"site": ctx.rng.get_state(), "server": server.rng.get_state(), "images": images, "bare": bare}
        seen.append((sha256(adapter), metrics, sha256(states)))
    assert seen[0] == seen[1] == seen[2]
    assert len(list(tmp_path.iterdir())) == 3


def test_other_work_has_other_names(generator: LatentDiffusion, tmp_path: Path) -> None:
    once = CachedGenerator(generator, tmp_path)
    adapter, _ = once.adapt(at_site())
    other, _ = once.adapt(at_site(1))
    assert sha256(adapter) != sha256(other)
    for adapted, prompts, settings in (
        (adapter, PROMPTS, generator),
        (other, PROMPTS, generator),
        (adapter, PROMPTS[::-1], generator),
        (adapter, PROMPTS, replace(generator, guidance=2.0)),
    ):
        CachedGenerator(settings, tmp_path).synthesize(adapted, prompts, LABELS, ServerContext(None, stream("server")))
    assert len(list(tmp_path.iterdir())) == 6


def test_validation_images_that_end_a_training_are_part_of_its_name(generator: LatentDiffusion, tmp_path: Path) -> None:
    patient = replace(generator, training=replace(generator.training, steps=12), lora=Lora(patience=1))
    for light in (0, 200):
        held = {"image": torch.full((4, 3, 32, 32), light, dtype=torch.uint8), "label": torch.arange(4) % 2}
        data = {"train": at_site().data["train"], "validation": held}
        once, alone = (each.adapt(replace(at_site(), data=data)) for each in (CachedGenerator(patient, tmp_path), patient))
        assert sha256(once[0]) == sha256(alone[0])
        assert once[1] == alone[1]
    assert len(list(tmp_path.iterdir())) == 2


def test_damage_is_told_in_one_line(generator: LatentDiffusion, tmp_path: Path) -> None:
    once = CachedGenerator(generator, tmp_path)
    once.adapt(at_site())
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    before = tiny.digest(tmp_path)
    with pytest.raises(InputError, match="is damaged"):
        once.adapt(at_site())
    assert tiny.digest(tmp_path) == before


def test_a_site_learns_alone_once_for_all_runs_that_need_it(tmp_path: Path) -> None:
    settings = DenoiserSettings(width=32, depth=1, latent="", steps=2, denoiser="dit", patch=4)
    training = Training(optimizer="adam", lr=1e-3, steps=3, batch_size=4)
    plain = Denoise((3, 8, 8), 2, settings)
    seen = []
    for task in (plain, replace(plain, shared=tmp_path), replace(plain, shared=tmp_path)):
        table = task.encoded(
            {"image": torch.randint(256, (6, 3, 8, 8), generator=stream("own")).byte(), "label": LABELS.repeat(2)}
        )
        ctx = ClientContext(task, {"train": table}, stream("site"), "a")
        model, metrics = task.learned_alone(ctx, training)
        latent = task.sample_alone(model, LABELS, ctx)
        seen.append((sha256(model), metrics, sha256({"latent": latent, "rng": ctx.rng.get_state()})))
    assert seen[0] == seen[1] == seen[2]
    assert len(list(tmp_path.iterdir())) == 2
    other = replace(plain, shared=tmp_path, settings=replace(settings, min_snr_gamma=0.0))
    other.learned_alone(ClientContext(other, {"train": table}, stream("site"), "a"), training)
    assert len(list(tmp_path.iterdir())) == 3
