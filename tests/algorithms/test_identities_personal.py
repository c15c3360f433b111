"""Exact identities of the methods with a personal model for each site."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from one_site import local, weights
from PIL import Image
from safetensors.torch import save_file
from sklearn.neighbors import KNeighborsClassifier
from tiny import arrays

from warmfed.algorithms import fedala
from warmfed.algorithms.dense import Ensemble, Imagination, frozen
from warmfed.algorithms.fedala import FedALA, Site, mixed
from warmfed.algorithms.fedproto import nearest, prototypes
from warmfed.algorithms.shared.distillation import divergence
from warmfed.config import resolve
from warmfed.core import ClientContext, Reply
from warmfed.core.admission import AdmissionPolicy
from warmfed.core.rng import fork, seeded, stream
from warmfed.core.tensors import mix, sub
from warmfed.core.training import Training
from warmfed.fit import at, fit, minibatches
from warmfed.models import initial
from warmfed.runs.execute import execute
from warmfed.runs.predict import predict
from warmfed.utils.errors import InputError

ASIDE = "abcd"
TRAINING = toy.TRAINING
PLAIN = Training(lr=0.03, momentum=0.0, batch_size=12)
play = functools.cache(toy.play)
quick = toy.quick


def near(a: dict, b: dict, atol: float = 1e-6) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=atol) for name in a)


# the words


def test_minibatches_are_fits() -> None:
    """One step of plain SGD on each of them is one fit."""
    data, start = toy.SITES["c"]["train"], weights("start")
    twice = replace(PLAIN, epochs=2)
    together, _ = fit(local(), start, twice, data)
    model = start
    for ctx, batch in minibatches(local(), twice, data):
        model, _ = fit(ctx, model, PLAIN, batch)
    assert near(model, together)
    assert not near(model, start)
    one = [
        len(batch["label"])
        for _, batch in minibatches(local(), replace(PLAIN, batch_size=6, gradient_accumulation_steps=2), data)
    ]
    assert one == [12, 12, 8]
    with pytest.raises(InputError, match="no rows"):
        list(minibatches(local(), PLAIN, {"label": torch.empty(0)}))


def test_a_model_at_other_weights_is_the_model_that_has_them() -> None:
    net, other = toy.TASK.build(), toy.TASK.build()
    images = torch.rand(2, *toy.SHAPE, generator=stream("images"))
    assert torch.equal(at(net, dict(other.named_parameters()))(images), other(images))
    assert not torch.equal(net(images), other(images))


def test_a_stream_aside_leaves_its_parent_where_it_is() -> None:
    parent = stream("parent")
    first = torch.rand(3, generator=fork(parent, "one"))
    assert torch.equal(first, torch.rand(3, generator=fork(parent, "one")))
    assert not torch.equal(first, torch.rand(3, generator=fork(parent, "two")))
    assert torch.equal(torch.rand(3, generator=parent), torch.rand(3, generator=stream("parent")))
    assert not torch.equal(first, torch.rand(3, generator=fork(parent, "one")))


# APFL


def test_apfl_without_a_personal_branch_is_fedavg() -> None:
    apfl = play(quick("apfl", alpha=0.0))
    fedavg = play(quick("fedavg")).model
    assert toy.same(apfl.model, fedavg)
    assert all(toy.same(apfl.personal(site), fedavg) for site in ASIDE)


def test_apfl_of_the_personal_branch_alone_is_local_training() -> None:
    apfl, alone = play(quick("apfl", alpha=1.0)), play(quick("local"))
    assert all(toy.same(apfl.personal(site), alone.personal(site)) for site in ASIDE)


def test_apfls_global_model_is_fedavgs_whatever_alpha() -> None:
    for settings in ({}, {"adaptive": True}):
        assert toy.same(play(quick("apfl", **settings)).model, play(quick("fedavg")).model)


def test_apfls_first_step_is_the_papers() -> None:
    """v ← v - ηα∇f(v̄) and α ← α - η⟨v - w, ∇f(v̄)⟩, from v ≠ w."""
    one = Training(lr=0.1, momentum=0.0, batch_size=64)
    algorithm = quick("apfl", adaptive=True, local=one)
    w, v, alpha = weights("w"), weights("v"), 0.25
    state = replace(algorithm.init_client_state(algorithm.init(toy.central()), local()), model=v, alpha=alpha)
    reply = algorithm.train(replace(algorithm.init(toy.central()), model=w), state, local())
    between = mix(w, v, alpha)
    stepped, _ = fit(local(), between, one, toy.SITES["c"]["train"])
    slope = {name: (between[name] - stepped[name]) / 0.1 for name in w}
    assert near(reply.state.model, {name: v[name] - 0.1 * alpha * slope[name] for name in v})
    wanted = alpha - 0.1 * sum(float(((v[name] - w[name]) * slope[name]).sum()) for name in v)
    assert reply.state.alpha == pytest.approx(wanted, abs=1e-5)
    assert 0 < wanted != alpha < 1


def test_apfls_alpha_stays_a_share() -> None:
    wild = quick("apfl", alpha=1.0, adaptive=True, local=Training(lr=3.0, momentum=0.0))
    outcome = play(wild, admission=AdmissionPolicy(max_update_ratio=0.0))  # at such a rate honest sites go far, too
    assert all(0 <= outcome.transport.state(site).alpha <= 1 for site in ASIDE)
    with pytest.raises(InputError, match="alpha must be at least 0"):
        quick("apfl", alpha=1.5)


# pFedMe


def test_pfedme_without_its_term_leaves_the_global_model_alone() -> None:
    outcome = play(quick("pfedme", lam=0.0))
    assert toy.same(outcome.model, toy.TASK.init(stream(0, "init")))
    assert not toy.same(outcome.personal("a"), outcome.model)


def test_pfedme_that_goes_all_the_way_in_one_step_is_fedavg() -> None:
    """θ̃ = w - lr·∇f(w), since the term's gradient is nothing at w; then w ← θ̃."""
    one = quick("pfedme", local=replace(PLAIN, steps=1), passes=1, lam=5.0, eta=0.2)
    assert near(play(one).model, play(quick("fedavg", local=PLAIN)).model)


def test_pfedme_of_a_server_that_stays_is_its_start() -> None:
    assert toy.same(play(quick("pfedme", beta=0.0)).model, toy.TASK.init(stream(0, "init")))


# Per-FedAvg


@pytest.mark.parametrize("variant", ["first-order", "hessian-free", "exact"])
def test_per_fedavg_without_its_inner_step_is_fedavg(variant: str) -> None:
    plain = play(quick("perfedavg", alpha=0.0, variant=variant, independent=False))
    assert near(plain.model, play(quick("fedavg")).model, 0.0 if variant == "first-order" else 1e-6)


def test_per_fedavgs_variants_differ_by_what_they_leave_out() -> None:
    models = {
        variant: play(quick("perfedavg", alpha=0.02, delta=0.01, variant=variant, independent=False, rounds=1)).model
        for variant in ("first-order", "hessian-free", "exact")
    }
    apart = {
        variant: max(value.abs().max().item() for value in sub(models[variant], models["exact"]).values()) for variant in models
    }
    assert apart["hessian-free"] < 0.1 * apart["first-order"]


def test_per_fedavgs_batches_are_parts_of_one() -> None:
    algorithm = quick("perfedavg", variant="hessian-free")
    batch = {"label": torch.arange(7)}
    assert [part["label"].tolist() for part in algorithm.parts(batch)] == [[0, 3, 6], [1, 4], [2, 5]]
    inner, outer, _ = quick("perfedavg").parts(batch)
    assert (inner["label"].tolist(), outer["label"].tolist()) == ([0, 2, 4, 6], [1, 3, 5])
    assert algorithm.parts({"label": torch.arange(2)})[1]["label"].tolist() == [0, 1]
    with pytest.raises(InputError, match="variant must be"):
        quick("perfedavg", variant="second-order")


# FedAMP


def test_fedamp_without_its_term_is_local_training() -> None:
    amp, alone = play(quick("fedamp", lam=0.0)), play(quick("local"))
    assert all(toy.same(amp.personal(site), alone.personal(site)) for site in ASIDE)


def test_fedamp_of_infinite_width_mixes_all_models_alike() -> None:
    outcome = play(quick("fedamp", attention="distance", sigma=1e12, alpha=1e12 / 4))
    models = [outcome.server.personal[site] for site in ASIDE]
    for site in ASIDE:
        assert near(outcome.server.cloud[site], {n: torch.stack([m[n] for m in models]).mean(0) for n in models[0]})


def test_heurfedamp_of_a_site_for_itself_mixes_nothing() -> None:
    outcome = play(quick("fedamp", itself=1.0))
    assert all(toy.same(outcome.server.cloud[site], outcome.server.personal[site]) for site in ASIDE)


def test_fedamps_similar_sites_weigh_more() -> None:
    flat = [torch.tensor(x, dtype=torch.float64) for x in ([1.0, 0.0], [0.9, 0.1], [-1.0, 2.0])]
    for settings in ({"attention": "distance", "sigma": 2.0, "alpha": 0.5}, {"attention": "cosine", "itself": 0.2}):
        weight = quick("fedamp", **settings).weights(flat)
        assert torch.allclose(weight.sum(1), torch.ones(3, dtype=torch.float64))
        assert weight[0, 1] > weight[0, 2] >= 0
    with pytest.raises(InputError, match="set alpha below sigma"):
        quick("fedamp", attention="distance", sigma=1e9, alpha=1e9).weights(flat)
    assert quick("fedamp").weights(flat[:1]).tolist() == [[1.0]]


# FedALA


def test_fedala_with_weights_of_one_is_fedavg() -> None:
    assert toy.same(play(quick("fedala", eta=0.0)).model, play(quick("fedavg")).model)
    assert toy.same(play(quick("fedala", adaptive="no such layer")).model, play(quick("fedavg")).model)
    assert not toy.same(play(quick("fedala")).model, play(quick("fedavg")).model)


def test_fedalas_personal_model_is_the_sites_last() -> None:
    outcome = play(quick("fedala", rounds=1))
    alone, _ = fit(
        ClientContext(toy.TASK, toy.SITES["b"], stream(0, "train", 0, "b")), toy.TASK.init(stream(0, "init")), TRAINING,
        toy.SITES["b"]["train"],
    )  # fmt: skip
    assert toy.same(outcome.personal("b"), alone)


def test_fedalas_weights_take_projected_gradient_steps() -> None:
    """W ← clip(W - η·∇L(Θ_i + (Θ - Θ_i)⊙W) ⊙ (Θ - Θ_i)), on all rows of the site in one batch."""
    mine, theirs, data = weights("mine"), weights("theirs"), toy.SITES["c"]["train"]
    start = {name: torch.full_like(value, 0.5) for name, value in mine.items()}
    algorithm = FedALA(share=1.0, eta=8.0, local=Training(batch_size=64))
    found = algorithm.learn(theirs, Site(mine, start), local())
    between = mixed(mine, theirs, start)
    stepped, _ = fit(local(), between, Training(lr=1.0, momentum=0.0, batch_size=64), data)
    for name, value in found.items():
        slope = (between[name] - stepped[name]) * (theirs[name] - mine[name])
        assert torch.allclose(value, (0.5 - 8.0 * slope).clamp(0, 1), atol=1e-4)
    assert found.keys() == mine.keys()
    assert torch.cat([w.flatten() for w in found.values()]).std() > 0


def test_fedalas_first_learning_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that falls by ever less would not end it: patience is never used up."""
    passes = []

    def counted(*arguments: Any) -> Any:
        passes.append(0)
        return minibatches(*arguments)

    monkeypatch.setattr(fedala, "minibatches", counted)
    play(quick("fedala", rounds=2, patience=10**6, passes=7))
    assert len(passes) == 7 * 4
    with pytest.raises(InputError, match="passes at least 1"):
        FedALA(passes=0)


def test_fedala_mixes_its_layers_only() -> None:
    mine, theirs = weights("mine"), weights("theirs")
    half = mixed(mine, theirs, {"head.bias": torch.full((3,), 0.5)})
    assert torch.equal(half["head.weight"], theirs["head.weight"])
    assert torch.allclose(half["head.bias"], (mine["head.bias"] + theirs["head.bias"]) / 2)


# FedProto


@pytest.fixture
def common(tmp_path: Path) -> object:
    """A task that starts from a file, so all sites have the same initial weights."""
    save_file(weights("start"), tmp_path / "start.safetensors")
    return replace(toy.TASK, start=str(tmp_path / "start.safetensors"))


def test_fedproto_without_its_term_is_local_training(common: object) -> None:
    proto = toy.play(quick("fedproto", lam=0.0, predict="head"), task=common)
    alone = toy.play(quick("local"), task=common)
    assert all(toy.same(proto.personal(site), alone.personal(site)) for site in ASIDE)


def test_fedprotos_prototypes_are_the_means_over_all_sites_images() -> None:
    """The linear model's features are its pixels, whoever trains it."""
    outcome = play(quick("fedproto"))
    images = torch.cat([toy.SITES[site]["train"]["image"].flatten(1) for site in ASIDE]) / 127.5 - 1
    label = torch.cat([toy.SITES[site]["train"]["label"] for site in ASIDE])
    for c in range(toy.CLASSES):
        assert torch.allclose(outcome.server.feature["mean"][c], images[label == c].mean(0), atol=1e-5)
    assert outcome.server.count["images"].tolist() == torch.bincount(label).tolist()


def test_fedprotos_head_is_the_nearest_prototype() -> None:
    features, label = torch.randn(20, 5, generator=stream("features")), torch.arange(20) % 3
    known = prototypes(features, label, 4)
    head = nearest(known)
    logits = features @ head["head.weight"].T + head["head.bias"]
    far = torch.cdist(features, known.feature["mean"])
    far[:, 3] = torch.inf  # nobody has seen the last class
    assert torch.equal(logits.argmax(1), far.argmin(1))
    assert torch.allclose(logits.softmax(1), (-far.square()).softmax(1), atol=1e-5)


def test_fedprotos_class_that_nobody_brings_keeps_its_prototype() -> None:
    algorithm = quick("fedproto")
    before = prototypes(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 2]), 3)
    now = prototypes(torch.tensor([[8.0], [4.0]]), torch.tensor([0, 1]), 3)
    server, _ = algorithm.aggregate(before, {"a": Reply(now, None, 1.0, {})}, toy.central())
    assert server.feature["mean"].flatten().tolist() == [8.0, 4.0, 5.0]
    assert server.count["images"].tolist() == [1, 1, 1]


def test_fedprotos_term_pulls_the_features_together() -> None:
    def spread(lam: float) -> float:
        sites = {site: toy.SITES[site] for site in "ad"}
        training = Training(lr=0.01, batch_size=16, epochs=2)
        task = replace(toy.TASK, model="cnn")
        outcome = toy.play(quick("fedproto", lam=lam, local=training), task=task, sites=sites, evaluate="never")
        means = [prototypes(task.features(outcome.transport.state(s).model, toy.SITES[s]["train"]),
                            toy.SITES[s]["train"]["label"], 3).feature["mean"] for s in "ad"]  # fmt: skip
        return (means[0] - means[1]).norm().item()

    assert spread(50.0) < 0.9 * spread(0.0)


# kNN-Per


def test_knnpers_global_model_is_fedavgs() -> None:
    assert toy.same(play(quick("knnper")).model, play(quick("fedavg")).model)


def test_knnper_of_no_memory_is_the_global_model() -> None:
    outcome = play(quick("knnper", shares=(0.0,)))
    for site in ASIDE:
        test = toy.SITES[site]["test"]
        own, shared = (toy.TASK.metrics(model, test) for model in (outcome.personal(site), outcome.model))
        assert own == pytest.approx(shared, abs=1e-5)


def test_knnper_of_memory_alone_is_scikit_learns() -> None:
    outcome = play(quick("knnper", shares=(1.0,), neighbours=5, scale=2.0))
    for site in ASIDE:
        train, test = (toy.TASK.features(outcome.model, toy.SITES[site][split]) for split in ("train", "test"))
        theirs = KNeighborsClassifier(5, weights=lambda far: np.exp(-far / 2.0))
        theirs.fit(train.numpy(), toy.SITES[site]["train"]["label"].numpy())
        ours = toy.TASK.predict(outcome.personal(site), toy.SITES[site]["test"]).exp()
        assert torch.allclose(ours, torch.from_numpy(theirs.predict_proba(test.numpy())).float(), atol=1e-4)


def test_knnpers_share_is_the_validations_best() -> None:
    outcome = play(quick("knnper"))
    for site in ASIDE:
        chosen, validation = outcome.personal(site), toy.SITES[site]["validation"]
        found = {
            share: toy.TASK.metrics({**chosen, "datastore.share": torch.tensor(share)}, validation)["accuracy"]
            for share in quick("knnper").shares
        }
        assert found[round(chosen["datastore.share"].item(), 1)] == max(found.values())
    with pytest.raises(InputError, match="shares must be numbers"):
        quick("knnper", shares=())


def test_knnpers_model_answers_from_its_file(tmp_path: Path) -> None:
    """A run folder's personal model has its datastore in it, and `predict` uses it."""
    picture, folder = tmp_path / "picture.png", tmp_path / "run"
    Image.fromarray(toy.SITES["a"]["test"]["image"][0].permute(1, 2, 0).numpy()).save(picture)
    settings = {"name": "knnper", "rounds": 1, "shares": [1.0], "neighbours": 1, "local": {"epochs": 1}}
    execute(
        resolve({"data": {"source": str(arrays(tmp_path / "data.npz"))}, "model": {"name": "linear"}, "algorithm": settings}),
        folder,
    )
    own = predict(folder, [picture], "a")[0]["probabilities"]
    assert sorted(round(p, 6) for p in own.values()) == [0, 0, 1]
    assert max(predict(folder, [picture])[0]["probabilities"].values()) < 1


# DENSE


def test_dense_without_distillation_is_one_round_of_fedavg() -> None:
    still = play(quick("dense", rounds=1, local=TRAINING, epochs=1, distillation=Training(lr=0.0)))
    assert toy.same(still.model, play(quick("fedavg", rounds=1)).model)


def test_denses_ensemble_is_the_mean_of_logits() -> None:
    nets = [toy.TASK.build() for _ in range(3)]
    images = torch.rand(2, *toy.SHAPE, generator=stream("images"))
    assert torch.allclose(Ensemble(nets)(images), sum(net(images) for net in nets) / 3, atol=1e-6)


def test_dense_of_one_site_keeps_its_model() -> None:
    """The student equals the ensemble, so its loss is zero."""
    sites = {"c": toy.SITES["c"]}
    outcome = toy.play(quick("dense", rounds=1, epochs=3, local=TRAINING), sites=sites)
    alone = toy.play(quick("fedavg", rounds=1), sites=sites)
    assert near(outcome.model, alone.model, 1e-5)


def test_denses_generator_draws_what_the_ensemble_recognises_or_what_the_student_does_not() -> None:
    algorithm = quick("dense", drawing=Training(optimizer="adam", lr=5e-3, steps=60, batch_size=24))
    knows, _ = fit(local(), weights("start"), Training(lr=0.03, epochs=5), toy.SITES["c"]["train"])
    ctx, label, student = toy.central(), torch.arange(24) % 3, weights("student")
    right, apart = {}, {}
    for disagreement in (0.0, 1.0):
        task = replace(algorithm, disagreement=disagreement).task(ctx, Ensemble([frozen(ctx, knows)]), student)
        with seeded(stream("begin")):
            begun = initial(task.build())
        drawn, _ = fit(replace(ctx, task=task, rng=stream("draw")), begun, algorithm.drawing, {"label": label})
        table = algorithm.imagine(replace(ctx, rng=stream("see")), task, drawn, label)
        right[disagreement] = table["right"].double().mean().item()
        theirs = toy.TASK.predict(student, table)
        apart[disagreement] = divergence(theirs, table["logits"], 1.0).item()
        assert table["image"].dtype == torch.uint8
    assert right[0.0] > 0.9
    assert apart[1.0] > 2 * apart[0.0]


def test_denses_images_have_the_tasks_size() -> None:
    for shape in ((1, 28, 28), (3, 9, 5)):
        assert Imagination(shape, 4, 8)(torch.arange(4)).shape == (4, *shape)


# FedDEO and FedBiP


@pytest.mark.parametrize("name", ["feddeo", "fedbip"])
def test_what_changes_nothing_makes_it_fgl(name: str) -> None:
    plain, fgl = toy.play(quick(name), generator=toy.Means(neutral=True)), play(quick("fgl"))
    for stage, number in (("warm", 0), ("train", 0), ("train", 1)):
        assert toy.same(plain.after(stage, number).server.model, fgl.after(stage, number).server.model)
    assert not toy.same(play(quick(name)).model, fgl.model)


@pytest.mark.parametrize("name", ["feddeo", "fedbip"])
def test_it_starts_where_warmfed_does_with_the_same_adapters(name: str) -> None:
    warm = play(quick("warmfed")).after("warm", 0)
    assert toy.same(play(quick(name)).after("warm", 0).server.model, warm.server.model)


def test_feddeo_and_fedbip_need_a_generator() -> None:
    for name in ("feddeo", "fedbip"):
        with pytest.raises(InputError, match="needs a generator"):
            toy.play(quick(name), generator=None)
    with pytest.raises(InputError, match="signal must be"):
        quick("fedbip", signal=1.0)
