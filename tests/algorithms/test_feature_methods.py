"""Methods whose server trains on what the sites' models say: FedPFT, CCVR, FedNCM and FedDF."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import toy

from warmfed.algorithms.fedncm import FedNCM
from warmfed.algorithms.fedproto import prototypes
from warmfed.algorithms.shared.feature_gaussians import check_gaussians, gaussians, merged, sampled
from warmfed.core.rng import stream
from warmfed.core.tensors import join, select
from warmfed.core.training import Training
from warmfed.utils.errors import InputError

FEATURES = torch.randn(60, 4, generator=stream("features")) * torch.tensor([1.0, 2.0, 0.5, 1.0])
LABEL = torch.arange(60) % 3


def everything(part: str = "train") -> Any:
    return join([tables[part] for tables in toy.SITES.values()])


def test_the_head_of_fedncm_is_the_class_means_of_all_images() -> None:
    algorithm = toy.quick("fedncm", rounds=0)
    outcome = toy.play(algorithm, task=toy.LAYERED)
    begun, table = toy.LAYERED.init(stream(0, "init")), everything()
    wanted = prototypes(toy.LAYERED.features(begun, table), table["label"], 3).feature["mean"]
    assert torch.allclose(outcome.model["head.weight"], torch.nn.functional.normalize(wanted, dim=1), atol=1e-5)
    assert toy.accuracy(outcome.rounds[-1], "global") > 60


def test_fedncm_with_a_head_that_is_not_replaced_is_fedavg() -> None:
    outcome, plain = toy.play(toy.quick("fedncm"), task=toy.LAYERED), toy.play(toy.quick("fedavg"), task=toy.LAYERED)
    start = toy.play(toy.quick("fedncm", rounds=0), task=toy.LAYERED).server
    algorithm: FedNCM = toy.quick("fedncm")
    rest = toy.play(algorithm, task=toy.LAYERED, start=(1, start))
    assert toy.same(rest.model, outcome.model)
    assert not toy.same(plain.model, outcome.model)


def test_the_merged_gaussian_is_that_of_all_features() -> None:
    """Two sites of unequal size and classes; the merge equals a fit of everything in one place."""
    parts = [(FEATURES[:17], LABEL[:17]), (FEATURES[17:], LABEL[17:])]
    sent = [gaussians(*part, 3, 1, "full", stream("fit")) for part in parts]
    one = merged(sent, [each.count["images"] for each in sent])
    whole = gaussians(FEATURES, LABEL, 3, 1, "full", stream("fit"))
    for name, value in whole.mixture.items():
        assert torch.allclose(one.mixture[name], value, atol=1e-5), name
    assert torch.equal(one.count["images"], whole.count["images"])


@pytest.mark.parametrize("covariance", ["spherical", "diagonal", "full"])
@pytest.mark.parametrize("components", [1, 2])
def test_samples_have_the_moments_of_the_features(covariance: Any, components: int) -> None:
    held = FEATURES[LABEL == 1]
    sent = gaussians(FEATURES, LABEL, 5, components, covariance, stream("fit"))
    table = sampled(sent, torch.tensor([0, 20000, 0, 0, 0]), covariance, stream("draw"))
    assert table["label"].unique().tolist() == [1]
    assert (table["feature"].mean(0) - held.mean(0)).abs().max() < 0.1
    got, wanted = table["feature"].var(0), held.var(0, unbiased=False)
    if covariance == "spherical" and components == 1:
        wanted = wanted.mean().expand(4)
    if covariance != "spherical" or components == 1:
        assert (got / wanted - 1).abs().max() < 0.1
    check_gaussians(sent, 5, 4, components, covariance, 60.0)


def test_classes_that_a_site_lacks_are_zeros_and_are_not_sampled() -> None:
    table = {name: toy.SITES["a"]["train"][name] for name in ("image", "label")}
    sites = {**toy.SITES, "a": {**toy.SITES["a"], "train": select(table, table["label"] != 2)}}
    sent: Any = {}

    class Tap(toy.Tap):
        def send(self, *asked: Any) -> Any:
            for site, reply, lines in super().send(*asked):
                sent[site] = reply.message
                yield site, reply, lines

    algorithm = toy.quick("fedpft")
    outcome = toy.play(algorithm, task=toy.LAYERED, sites=sites)
    assert outcome.rounds[0].aggregate["samples"] == sum(len(tables["train"]["label"]) for tables in sites.values())
    assert toy.accuracy(outcome.rounds[0], "global") > 60


def test_one_image_of_a_class_is_a_point() -> None:
    sent = gaussians(FEATURES[:1], LABEL[:1], 3, 3, "diagonal", stream("fit"))
    assert sent.mixture["share"][0].tolist() == [1.0, 0.0, 0.0]
    assert (sampled(sent, torch.tensor([5, 0, 0]), "diagonal", stream("draw"))["feature"] - FEATURES[0]).abs().max() < 0.01


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: {**m, "share": -m["share"]}, "below 0"),
        (lambda m: {**m, "share": m["share"] * 2}, "do not add up to 1"),
        (lambda m: {**m, "spread": m["spread"] - 9}, "below 0"),
        (lambda m: {**m, "mean": m["mean"][:, :, :2]}, "tensor 'mean'"),
        (lambda m: {**m, "more": m["mean"]}, "tensor 'more'"),
    ],
)
def test_forged_mixtures_are_refused(change: Any, words: str) -> None:
    sent = gaussians(FEATURES, LABEL, 3, 1, "diagonal", stream("fit"))
    with pytest.raises(InputError, match=words):
        check_gaussians(replace(sent, mixture=change(sent.mixture)), 3, 4, 1, "diagonal", 60.0)
    with pytest.raises(InputError, match="class counts whose sum is 59"):
        check_gaussians(sent, 3, 4, 1, "diagonal", 59.0)


def test_a_covariance_that_is_none_is_refused() -> None:
    sent = gaussians(FEATURES, LABEL, 3, 1, "full", stream("fit"))
    check_gaussians(sent, 3, 4, 1, "full", 60.0)
    for value in (1e6, -1e6):
        spread = sent.mixture["spread"].clone()
        spread[0, 0, 0, 1] = value
        with pytest.raises(InputError, match="not symmetric"):
            check_gaussians(replace(sent, mixture={**sent.mixture, "spread": spread}), 3, 4, 1, "full", 60.0)
        spread[0, 0, 1, 0] = value  # symmetric, with a negative eigenvalue
        with pytest.raises(InputError, match="below 0"):
            check_gaussians(replace(sent, mixture={**sent.mixture, "spread": spread}), 3, 4, 1, "full", 60.0)


def test_a_class_that_no_site_holds_is_never_predicted() -> None:
    sites = {
        site: {part: select(table, table["label"] != 2) if part != "test" else table for part, table in tables.items()}
        for site, tables in toy.SITES.items()
    }
    model = toy.play(toy.quick("fedncm", rounds=0), task=toy.LAYERED, sites=sites).model
    assert 2 not in toy.LAYERED.predict(model, everything("test")).argmax(-1).tolist()


def test_no_more_features_are_sampled_than_set() -> None:
    outcome = toy.play(toy.quick("fedpft", most=2, rounds=0), task=toy.LAYERED)
    assert outcome.rounds[0].aggregate["samples"] == 2 * 3 * len(toy.SITES)


@pytest.mark.parametrize(("name", "settings"), [("fedpft", {"components": 0}), ("ccvr", {"per_class": 0})])
def test_settings_out_of_range_are_refused(name: str, settings: Any) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        toy.quick(name, **settings)


@pytest.mark.parametrize(("name", "field"), [("ccvr", "head"), ("feddf", "distillation")])
def test_without_training_at_the_server_it_is_fedavg(name: str, field: str) -> None:
    assert toy.same(toy.play(toy.quick(name, **{field: Training(lr=0.0)})).model, toy.play(toy.quick("fedavg")).model)


def test_feddf_of_one_site_keeps_its_model() -> None:
    sites, sgd = {"c": toy.SITES["c"]}, Training(lr=0.1, batch_size=12)
    alone = toy.play(toy.quick("feddf", distillation=sgd), sites=sites, evaluate="never").model
    for name, value in toy.play(toy.quick("fedavg"), sites=sites, evaluate="never").model.items():
        torch.testing.assert_close(alone[name], value, atol=1e-5, rtol=0)


def test_feddf_learns_the_mean_of_the_sites_logits() -> None:
    long = Training(optimizer="adam", lr=0.01, epochs=60, batch_size=60)
    algorithm = toy.quick("feddf", rounds=1)
    apart, near = (
        toy.play(replace(algorithm, distillation=each), evaluate="never").rounds[-1].aggregate["distillation_loss"]
        for each in (replace(long, lr=0.0), long)
    )
    assert near < apart / 4


def test_feddf_with_adapters_that_change_nothing_is_feddf_on_the_base() -> None:
    adapters = toy.play(toy.quick("feddf", images="adapters"), generator=toy.Means(neutral=True), evaluate="never")
    assert toy.same(adapters.model, toy.play(toy.quick("feddf"), evaluate="never").model)
    assert [r.stage for r in adapters.rounds] == ["adapt", "draw", "train", "train"]
