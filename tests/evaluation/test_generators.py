"""Scores of samples, each against a known result."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from warmfed import models
from warmfed.core.rng import stream
from warmfed.core.tensors import apportion
from warmfed.data import Federation, Site
from warmfed.evaluation.features import extractor
from warmfed.evaluation.generators import adapter_scores
from warmfed.metrics.images import distances, diversity, memorization_rate, nearest, neighbourhoods
from warmfed.models import FEATURE_EXTRACTORS
from warmfed.tasks import Classify
from warmfed.utils.errors import InputError


def points(name: str, n: int = 400, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, 6, generator=stream(name)) + shift


def test_frechet_distance_is_its_formula() -> None:
    from scipy.linalg import sqrtm

    a, b = points("a"), 1.5 * points("b") + torch.arange(6) * 0.1
    first, second = np.cov(a.double().numpy().T), np.cov(b.double().numpy().T)
    gap = (a.double().mean(0) - b.double().mean(0)).square().sum().item()
    wanted = gap + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert distances(a, b)["fid"] == pytest.approx(wanted, abs=1e-3)


def test_kernel_distance_is_its_formula() -> None:
    a, b = points("a", 50), points("b", 50, 0.5)
    kernel = lambda x, y: (x.double() @ y.double().T / 6 + 1) ** 3  # noqa: E731
    xx, yy, xy = kernel(a, a), kernel(b, b), kernel(a, b)
    off = lambda k: (k.sum() - k.diagonal().sum()) / (50 * 49)  # noqa: E731
    assert distances(a, b)["kid"] == pytest.approx((off(xx) + off(yy) - 2 * xy.mean()).item(), rel=1e-6)


def test_neighbourhoods_on_a_line() -> None:
    # real 0, 1, 2, 3 (each within 1 of its nearest), samples 0.5, 0.6 and 9
    real, fake = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[0.5], [0.6], [9.0]])
    found = neighbourhoods(real, fake, 1)
    assert found["precision"] == pytest.approx(100 * 2 / 3)  # 9 is far from all
    assert found["density"] == pytest.approx(100 * (2 + 2) / 3)  # 0.5 and 0.6 each lie within reach of 0 and 1
    assert found["coverage"] == pytest.approx(100 * 2 / 4)  # 0 and 1 have a sample within reach
    # samples reach 0.1, 0.1 and 8.4: only the last one reaches, as far back as 0.6
    assert found["recall"] == pytest.approx(100 * 3 / 4)


def test_copies_are_found() -> None:
    train, test = points("train", 300), points("test", 300)
    assert memorization_rate(train, test, train[:50])["memorization_rate"] == 100
    assert memorization_rate(train, test, points("new", 300))["memorization_rate"] < 12


def test_labels_as_frequent_as_the_data() -> None:
    assert apportion(torch.tensor([10, 0, 5, 5]), 8).tolist() == [0, 0, 0, 0, 2, 2, 3, 3]
    assert apportion(torch.tensor([2, 1]), 4).bincount().tolist() == [3, 1]


@pytest.mark.parametrize("name", FEATURE_EXTRACTORS)
def test_networks_of_a_file(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = FEATURE_EXTRACTORS[name]().eval()
    weights = {key: value.numpy() for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    np.savez(tmp_path / "features.npz", **weights)
    extract, digest = extractor(str(tmp_path / "features.npz"), "digits", (3, 32, 32))
    image = torch.randint(256, (3, 3, 32, 32), generator=stream("image"), dtype=torch.uint8)
    assert torch.allclose(extract(image), net(image), atol=1e-6)
    assert len(digest) == 64


def test_the_public_classifier_looks_too(tmp_path: Path) -> None:
    extract, _ = extractor("public", "digits", (3, 32, 32))
    assert extract(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 128)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(InputError, match="holds none of the networks lenet, resnet20"):
        extractor(str(tmp_path / "other.npz"), "digits", (3, 32, 32))
    (tmp_path / "broken.npz").write_bytes(b"no zip")
    with pytest.raises(InputError, match="damaged"):
        extractor(str(tmp_path / "broken.npz"), "digits", (3, 32, 32))


@pytest.mark.parametrize("name", models.MODELS)
def test_a_classifier_of_any_network_and_any_classes_looks(name: str, tmp_path: Path) -> None:
    """A ResNet-18 with two hundred classes, as the public classifier of a base may be."""
    image = torch.randint(256, (3, 3, 32, 32), generator=stream("image"), dtype=torch.uint8)
    task = Classify((3, 32, 32), 7, name)
    model = task.init(stream("classifier"))
    save_file(dict(model), tmp_path / "features.safetensors")
    extract, _ = extractor(str(tmp_path / "features.safetensors"), "digits", (3, 32, 32))
    assert torch.equal(extract(image), task.features(model, {"image": image}))
    assert Classify.of(tmp_path / "features.safetensors", (3, 32, 32), "it")[0] == task
    if name != "resnet18":  # which takes any size
        with pytest.raises(InputError, match="does not fit the model"):
            extractor(str(tmp_path / "features.safetensors"), "digits", (3, 64, 64))
    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="holds none of the networks cnn"):
        extractor(str(tmp_path / "other.safetensors"), "digits", (3, 32, 32))


def test_diversity_is_a_share_of_that_of_real_images() -> None:
    real, label = torch.cat([points("r0", 40), points("r1", 40, 9.0)]), torch.arange(2).repeat_interleave(40)
    assert diversity(real, label, real, label) == pytest.approx(100)
    assert diversity(real, label, 0.5 * real, label) == pytest.approx(50)
    assert diversity(real, label, real[:40].mean(0).expand(8, -1), torch.zeros(8)) == 0  # one picture again and again


def test_the_nearest_sample_to_a_training_image() -> None:
    train, test = torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([[2.0, 0.0], [4.0, 0.0], [11.0, 0.0]])
    assert nearest(train, test, torch.tensor([[0.0, 3.0], [10.0, 1.0]])) == 50  # the median of 2, 4 and 1 is 2
    assert nearest(train, test, torch.cat([test, train[:1]])) == 0


LIGHTS = (("a", 0), ("b", 190))


def test_the_samples_of_each_adapter_are_measured_against_its_own_site() -> None:
    def table(name: str, light: int, count: int) -> dict[str, torch.Tensor]:
        image = torch.randint(light, light + 60, (count, 3, 8, 8), generator=stream("panel", name), dtype=torch.uint8)
        return {"image": image, "label": torch.arange(count) % 2}

    sites = {name: Site(table(name, light, 40), table("v", light, 4), table(f"t{name}", light, 20)) for name, light in LIGHTS}
    federation = Federation("two", ("x", "y"), "a {}", sites)
    good, wrong = table("sa", 0, 30), table("sb", 20, 30)  # b's adapter draws too dark
    samples = {"b": wrong | {"kept": torch.arange(30) < 15}, "a": good | {"kept": torch.ones(30, dtype=torch.bool)}}
    extract = lambda image: image.float().mean((2, 3))  # noqa: E731
    found = adapter_scores(extract, federation, samples, 5)
    assert found["a"]["fid"] < 0.1 * found["b"]["fid"]
    assert found["a"]["precision"] > 80
    assert found["b"]["precision"] == found["b"]["memorization_rate"] == 0
    assert (found["a"]["kept"], found["b"]["kept"]) == (100, 50)
    assert found["a"]["samples"] == 30
    assert found["a"]["fid"] < 20 * found["a"]["floor_fid"]
    assert found["b"]["nearest"] > 100 > found["a"]["nearest"]
    few = Federation("two", ("x", "y"), "a {}", {**sites, "a": Site(table("a", 0, 40), table("v", 0, 4), table("t", 0, 1))})
    assert found["a"].keys() - adapter_scores(extract, few, samples, 5)["a"].keys() == {"floor_fid", "floor_kid"}
