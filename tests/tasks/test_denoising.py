"""The denoising task: loss and samplers agree with diffusers, samples are reproducible, tables are encoded once."""

import dataclasses
from typing import Any

import pytest
import torch
import toy
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn

from warmfed.core.rng import seeded, stream
from warmfed.core.training import Training
from warmfed.diffusion.networks import DenoiserSettings
from warmfed.fit import fit
from warmfed.tasks.denoising import Denoise, _autoencoder
from warmfed.utils.errors import InputError

TASK = toy.DRAWING
TABLE = TASK.encoded(toy.SITES["a"]["train"])


def with_settings(**changes: Any) -> Denoise:
    return dataclasses.replace(TASK, settings=dataclasses.replace(TASK.settings, **changes))


@pytest.mark.parametrize("denoiser", ["dit", "unet"])
@pytest.mark.parametrize("conditional", [True, False])
def test_it_learns_and_draws(denoiser: str, conditional: bool) -> None:
    task = with_settings(denoiser=denoiser, conditional=conditional, width=32, depth=1)
    start = task.init(stream("start"))
    model, info = fit(toy.central(task=task), start, Training(optimizer="adamw", lr=3e-3, epochs=8, batch_size=12), TABLE)
    assert task.metrics(model, TABLE)["loss"] < 0.9 * task.metrics(start, TABLE)["loss"]
    assert info["loss"] < info["first_loss"]
    label = torch.tensor([0, 1, 2, 2])
    drawn = task.sample(model, label, stream("draw"))
    assert drawn.shape == (4, *toy.SHAPE)
    assert drawn.isfinite().all()
    assert task.decoded(drawn).dtype == torch.uint8
    assert torch.equal(drawn, task.sample(model, label, stream("draw")))
    other = task.sample(model, label.flip(0), stream("draw"))
    assert torch.equal(drawn, other) is not conditional


def test_metrics_do_not_disturb_and_repeat() -> None:
    model = TASK.init(stream(0))
    torch.manual_seed(3)
    first = torch.rand(1)
    torch.manual_seed(3)
    found = TASK.metrics(model, TABLE)
    assert torch.equal(torch.rand(1), first)
    assert TASK.metrics(model, TABLE) == found
    assert found["count"] == len(TABLE["label"])


class Constant(nn.Module):
    """Predicts the same number everywhere."""

    def forward(self, noisy: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return torch.full_like(noisy, 0.25)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_loss_is_that_of_diffusers(prediction: str, schedule: str) -> None:
    task = with_settings(prediction=prediction, schedule=schedule, min_snr_gamma=0.0, dropout=0.0)
    with seeded(stream("loss")):
        found = task.loss(Constant(), TABLE)
    with seeded(stream("loss")):  # the same draws: classes forgotten, times, noise
        n = len(TABLE["label"])
        torch.rand(n)
        time = ((torch.arange(n) + torch.rand(n)) / n * 50).long()
        noise = torch.randn(TABLE["latent"].shape)
    kinds = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
    scheduler = DDPMScheduler(num_train_timesteps=50, beta_schedule=kinds[schedule])
    target = noise if prediction == "epsilon" else scheduler.get_velocity(TABLE["latent"], noise, time)
    assert found.item() == pytest.approx((0.25 - target).square().mean().item(), abs=1e-5)


class Exact(nn.Module):
    """Predicts the exact noise if every image is `image`."""

    def __init__(self, image: torch.Tensor, alphas: torch.Tensor) -> None:
        super().__init__()
        self.image, self.alphas = image, alphas

    def forward(self, noisy: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        signal = self.alphas[time].view(-1, 1, 1, 1)
        return (noisy - signal.sqrt() * self.image) / (1 - signal).sqrt()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_a_denoiser_that_knows_the_image_draws_it(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = with_settings(sampler=sampler, steps=25)
    image = torch.linspace(-0.9, 0.9, 192).view(toy.SHAPE)
    exact = Exact(image, DDIMScheduler(num_train_timesteps=50, beta_schedule="linear").alphas_cumprod)
    monkeypatch.setattr(Denoise, "build", lambda self: exact)
    drawn = task.sample({}, torch.zeros(3, dtype=torch.int64), stream("draw"))
    assert (drawn - image).abs().max() < 0.05


def test_ddim_is_the_scheduler_of_diffusers_step_by_step() -> None:
    task = with_settings(sampler="ddim", steps=5)
    model, label = task.init(stream(1)), torch.tensor([0, 2])
    net = task.build().eval()
    net.load_state_dict(dict(model))
    scheduler = DDIMScheduler(num_train_timesteps=50, beta_schedule="linear", prediction_type="epsilon")
    scheduler.set_timesteps(5)
    latent = torch.randn((2, *toy.SHAPE), generator=stream("draw"))
    with torch.no_grad():
        for time in scheduler.timesteps:
            latent = scheduler.step(net(latent, time.expand(2), label), time, latent).prev_sample
    assert torch.allclose(task.sample(model, label, stream("draw")), latent, atol=1e-5)


def test_guidance_of_one_is_none() -> None:
    model, label = TASK.init(stream(1)), torch.tensor([0, 2])
    plain = TASK.sample(model, label, stream("draw"))
    assert not torch.allclose(with_settings(guidance=3.0).sample(model, label, stream("draw")), plain)


def test_the_latents_of_a_base() -> None:
    task = Denoise((3, 32, 32), 3, DenoiserSettings(width=32, depth=1))
    image = torch.randint(256, (2, 3, 32, 32), generator=stream("image"), dtype=torch.uint8)
    table = task.encoded({"image": image, "label": torch.tensor([0, 1])})
    assert table["latent"].shape == (2, *task.space) == (2, 8, 8, 8)
    assert task.decoded(table["latent"]).shape == image.shape


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"denoiser": "gan"}, "denoiser must be one of unet, dit"),
        ({"sampler": "euler"}, "sampler must be one of"),
        ({"width": 30}, "multiple of 32"),
        ({"conditional": False, "guidance": 2.0}, "guidance needs a conditional denoiser"),
    ],
)
def test_bad_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        DenoiserSettings(**changes)


def test_a_network_without_weights_needs_no_base_loaded_before() -> None:
    """A first call on the meta device still loads a usable autoencoder."""
    _autoencoder.cache_clear()
    with torch.device("meta"):
        shapes = Denoise((3, 32, 32), 10).build().state_dict()
    assert all(tensor.is_meta for tensor in shapes.values())
    assert not any(tensor.is_meta for tensor in _autoencoder("digits").vae.state_dict().values())


def test_patches_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="patches of 3 do not divide"):
        with_settings(patch=3).build()
