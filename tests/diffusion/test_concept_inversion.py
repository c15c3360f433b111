"""Descriptions, concept vectors and noised latents of FedDEO and FedBiP, on a pipeline with random weights."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from warmfed.core import ClientContext, GeneratorSpec, ServerContext
from warmfed.core.rng import seeded, stream
from warmfed.core.tensors import sha256
from warmfed.core.training import Training
from warmfed.diffusion import lora as lora
from warmfed.diffusion import pipeline
from warmfed.diffusion.concept_inversion import Concepts
from warmfed.diffusion.generator import LatentDiffusion
from warmfed.diffusion.result_cache import CachedGenerator
from warmfed.runs.generators import build_generator
from warmfed.utils.errors import InputError

with warnings.catch_warnings():
    # diffusers and transformers import modules of their own that are deprecated
    warnings.simplefilter("ignore")
    from warmfed.pretraining.pretrain import Pretraining, build

PROMPTS = ("a photo of the digit zero", "a photo of the digit one", "a photo of the digit two")
TABLE = {
    "image": torch.randint(256, (12, 3, 32, 32), generator=stream("images"), dtype=torch.uint8),
    "label": torch.arange(12) % 3,
}
LABELS = torch.tensor([0, 1, 2, 1])
TRAINING = Training(optimizer="adamw", lr=0.02, epochs=2, batch_size=6, max_grad_norm=1.0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    folder = tmp_path_factory.mktemp("base") / "own"
    with seeded(stream("tiny")):
        parts = build(Pretraining(channels=4, decoder_width=8, widths=(16, 32), text_width=16, text_layers=1))
    pipeline.save(parts, folder)
    return LatentDiffusion(str(folder), rank=2, steps=3, guidance=2.0, batch_size=3)


def local(purpose: str = "adapt") -> ClientContext:
    return ClientContext(None, {"train": TABLE}, stream(purpose), "ink", PROMPTS)


def central(purpose: str = "sample") -> ServerContext:
    return ServerContext(None, stream(purpose))


def described(plain: LatentDiffusion) -> LatentDiffusion:
    return build_generator(plain, GeneratorSpec("prompts", TRAINING))  # type: ignore[return-value]


def conceived(plain: LatentDiffusion, signal: float, variation: float) -> Concepts:
    return build_generator(plain, GeneratorSpec("concepts", TRAINING, signal, variation))  # type: ignore[return-value]


def base(plain: LatentDiffusion) -> list[str]:
    parts = lora.parts(plain.base, "cpu")
    return [sha256(model.state_dict()) for model in (parts.denoiser, parts.vae, parts.text_encoder)]


# descriptions


def test_a_description_is_prompts_and_nothing_else(plain: LatentDiffusion, tmp_path: Path) -> None:
    before, generator = base(plain), described(plain)
    adapter, info = generator.adapt(local())
    assert adapter.keys() == {"prompts"}
    assert adapter["prompts"].shape == (3, 16, 16)
    assert adapter["prompts"].dtype == torch.float16
    assert info["steps"] == 4
    assert base(plain) == before
    generator.check(adapter, PROMPTS, "it")
    with pytest.raises(InputError, match="lacks tensor"):
        plain.check(adapter, PROMPTS, "it")
    generator.write(adapter, tmp_path, "ink")
    assert [path.name for path in tmp_path.iterdir()] == ["ink.prompts.safetensors"]


def test_a_description_that_is_the_text_draws_what_the_base_draws(plain: LatentDiffusion) -> None:
    generator = described(plain)
    text = {"prompts": lora.parts(plain.base, "cpu").embed(PROMPTS)["prompt"]}
    drawn = generator.synthesize(text, PROMPTS, LABELS, central())
    assert torch.equal(drawn, plain.synthesize(None, PROMPTS, LABELS, central()))
    other = generator.synthesize({"prompts": text["prompts"] + 1}, PROMPTS, LABELS, central())
    assert not torch.equal(drawn, other)


def test_a_generator_must_have_something_to_learn() -> None:
    with pytest.raises(InputError, match="nothing to learn"):
        LatentDiffusion(target_modules="none", prompts=False)


# concepts and latents


@pytest.fixture(scope="module")
def concepts(plain: LatentDiffusion) -> Concepts:
    return conceived(plain, 0.0047, 0.1)


def neutral(concepts: Concepts, latent: Tensor, of: Tensor) -> dict[str, Tensor]:
    return {"domain": torch.zeros(16), "concept": torch.zeros(3, 16), "latent": latent, "of": of}


def test_concepts_are_vectors_and_latents(plain: LatentDiffusion, concepts: Concepts, tmp_path: Path) -> None:
    before = base(plain)
    adapter, info = concepts.adapt(local())
    again, _ = concepts.adapt(local())
    assert sha256(adapter) == sha256(again)
    assert {name: (tuple(value.shape), value.dtype) for name, value in adapter.items()} == {
        "domain": ((16,), torch.float16),
        "concept": ((3, 16), torch.float16),
        "latent": ((12, 4, 8, 8), torch.float16),
        "of": ((12,), torch.int64),
    }
    assert adapter["domain"].abs().min() > 0
    assert adapter["concept"].abs().min() > 0
    assert info["steps"] == 4
    assert base(plain) == before
    concepts.check(adapter, PROMPTS, "it")
    concepts.write(adapter, tmp_path, "ink")
    assert [path.name for path in tmp_path.iterdir()] == ["ink.concepts.safetensors"]


def test_no_concepts_and_pure_noise_are_the_base(plain: LatentDiffusion) -> None:
    """Bit for bit: the same noise, the same prompts, the same times."""
    noise = torch.randn(4, 4, 8, 8, generator=stream("sample"))
    still = conceived(plain, 0.0, 0.0)
    drawn = still.synthesize(neutral(still, noise[[0, 1, 3, 2]], torch.tensor([0, 1, 1, 2])), PROMPTS, LABELS, central("other"))
    assert torch.equal(drawn, plain.synthesize(None, PROMPTS, LABELS, central("sample")))
    assert torch.equal(still.synthesize(None, PROMPTS, LABELS, central()), plain.synthesize(None, PROMPTS, LABELS, central()))


def test_sampling_begins_where_the_latents_are(plain: LatentDiffusion) -> None:
    alphas = lora.parts(plain.base, "cpu").scheduler.alphas_cumprod
    for signal in (0.0047, 0.3):
        begin = conceived(plain, signal, 0.0).begin(alphas)
        assert alphas[begin] <= signal < alphas[begin - 1]
    assert conceived(plain, 0.0, 0.0).begin(alphas) == len(alphas) - 1


def test_a_latent_is_a_mixture_of_its_class_under_noise(plain: LatentDiffusion) -> None:
    mean, _ = lora.parts(plain.base, "cpu").encode(TABLE["image"])
    alone = {"image": TABLE["image"], "label": torch.arange(12)}  # every image is its own partner
    concepts = conceived(plain, 0.36, 0.1)
    residual = concepts.noised(alone, "cpu", stream("noise")) - 0.6 * mean
    assert residual.std().item() == pytest.approx(0.8, abs=0.02)
    assert residual.mean().item() == pytest.approx(0, abs=0.05)
    clear = replace(concepts, signal=1.0)
    assert torch.allclose(clear.noised(alone, "cpu", stream("noise")), mean, atol=1e-5)
    mixed = clear.noised(TABLE, "cpu", stream("noise"))
    for i in range(12):
        # between its own latent and that of one of the three others of its class
        ways = [(mixed[i] - mean[i]).flatten() / (mean[j] - mean[i]).flatten() for j in range(i % 3, 12, 3) if j != i]
        assert min(way.std().item() for way in ways) < 1e-3 or torch.allclose(mixed[i], mean[i], atol=1e-5)


def test_the_domains_vector_varies_from_sample_to_sample(plain: LatentDiffusion) -> None:
    latent, of = torch.randn(3, 4, 8, 8, generator=stream("one")), torch.arange(3)
    twice = torch.tensor([1, 1])

    def drawn(variation: float) -> Tensor:
        concepts = conceived(plain, 0.0, variation)
        return concepts.synthesize(neutral(concepts, latent, of), PROMPTS, twice, central())

    assert torch.equal(*drawn(0.0))
    assert not torch.equal(*drawn(1.0))


def test_a_sampler_that_draws_noise_draws_it_from_the_run_s_numbers(plain: LatentDiffusion) -> None:
    latent = torch.randn(3, 4, 8, 8, generator=stream("one"))
    few = conceived(replace(plain, sampler="lcm"), 0.0, 0.0)
    first, again = (few.synthesize(neutral(few, latent, torch.arange(3)), PROMPTS, LABELS, central()) for _ in range(2))
    assert torch.equal(first, again)


def test_latents_are_taken_in_turn() -> None:
    of = torch.tensor([1, 0, 1, 0, 1])
    assert Concepts.turns(of, torch.tensor([0, 0, 0, 1, 1])).tolist() == [1, 3, 1, 0, 2]
    with pytest.raises(InputError, match="has class 2, but sent no latent"):
        Concepts.turns(of, torch.tensor([2]))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda a: a.pop("domain"), "lacks tensor"),
        (lambda a: a.update(latent=a["latent"] * torch.inf), "not finite"),
        (lambda a: a.update(latent=a["latent"][:2]), "has shape"),
        (lambda a: a.update(of=a["of"] + 1), "must name a class from 0 to 2"),
        (lambda a: a.update(of=a["of"].half()), "must name a class from 0 to 2"),
        (lambda a: a.update(of=torch.tensor(0)), "must name a class from 0 to 2"),
        (lambda a: a.update(domain=a["domain"].float()), "expected torch.float16"),
        (lambda a: a.update(of=torch.tensor([0, 0, 1])), "has class 2, but sent no latent of it"),
    ],
)
def test_spoiled_concepts_are_refused(spoil: object, words: str, concepts: Concepts) -> None:
    adapter = {name: t.half() for name, t in neutral(concepts, torch.ones(3, 4, 8, 8), torch.arange(3)).items()}
    adapter["of"] = torch.arange(3)
    concepts.check(adapter, PROMPTS, "the adapter of site 'ink'", (0, 2))
    spoil(adapter)
    with pytest.raises(InputError, match=words):
        concepts.check(adapter, PROMPTS, "the adapter of site 'ink'", (0, 2))


def test_equal_work_is_done_once_in_every_form(plain: LatentDiffusion, tmp_path: Path) -> None:
    for own in (described(plain), conceived(plain, 0.1, 0.1)):
        form = CachedGenerator(own, tmp_path)
        before = len(list(tmp_path.iterdir()))
        first, again, wanted = form.adapt(local()), form.adapt(local()), own.adapt(local())
        assert sha256(first[0]) == sha256(again[0]) == sha256(wanted[0])
        assert first[1] == again[1] == wanted[1]
        assert len(list(tmp_path.iterdir())) == before + 1
