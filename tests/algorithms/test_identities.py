"""Exact identities of the algorithms, which find errors that accuracy curves do not show."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy
from one_site import local, weights
from safetensors.torch import load_file, save_file

from warmfed.algorithms.shared.distillation import Distillation
from warmfed.algorithms.shared.synthetic_data import Synthesis, balanced_subset, cross_predict, draw, warm_start
from warmfed.algorithms.warmfed import ValidationVote, WarmFed
from warmfed.core import ClientContext, Reply
from warmfed.core.rng import spawn, stream
from warmfed.core.tensors import join, mean, mix, rows, select, sub
from warmfed.core.training import Training
from warmfed.fit import fit
from warmfed.run import run
from warmfed.tasks import Classify
from warmfed.transports.in_process import InProcess
from warmfed.utils.errors import InputError

TRAINING = toy.TRAINING
ASIDE = "abcd"
play = functools.cache(toy.play)
quick = toy.quick


def personal(outcome: toy.Outcome) -> list[dict[str, torch.Tensor]]:
    return [dict(outcome.personal(site)) for site in ASIDE]


def all_same(a: list, b: list) -> bool:
    return all(toy.same(x, y) for x, y in zip(a, b, strict=True))


# the baselines


def test_fedprox_without_its_term_is_fedavg() -> None:
    assert toy.same(play(quick("fedprox", mu=0.0)).model, play(quick("fedavg")).model)
    assert not toy.same(play(quick("fedprox", mu=0.5)).model, play(quick("fedavg")).model)


def test_one_round_of_fedavg_is_the_weighted_mean_of_local_training() -> None:
    server = play(quick("fedavg", rounds=1))
    start = toy.TASK.init(stream(0, "init"))
    models = {
        site: fit(ClientContext(toy.TASK, data, stream(0, "train", 0, site)), start, TRAINING, data["train"])[0]
        for site, data in toy.SITES.items()
    }
    share = {"a": 24 / 120, "b": 28 / 120, "c": 32 / 120, "d": 36 / 120}
    for name, value in server.model.items():
        assert torch.allclose(value, sum(share[site] * models[site][name] for site in models), atol=1e-7)


@pytest.fixture
def common(tmp_path: Path) -> Classify:
    """A task that starts from a file, so all sites have the same initial weights."""
    save_file(weights("start"), tmp_path / "start.safetensors")
    return replace(toy.TASK, start=str(tmp_path / "start.safetensors"))


def test_fedper_that_keeps_everything_is_local_training(common: Classify) -> None:
    alone, kept = toy.play(quick("local"), task=common), toy.play(quick("fedper", private=""), task=common)
    assert all_same(personal(alone), personal(kept))
    assert not kept.server.model


def test_fedper_that_keeps_nothing_is_fedavg() -> None:
    shared = play(quick("fedper", private="no such layer"))
    assert all_same(personal(shared), [dict(play(quick("fedavg")).model)] * 4)


def test_fedper_averages_the_body_and_leaves_the_heads_apart() -> None:
    task = replace(toy.TASK, model="cnn")
    outcome = toy.play(quick("fedper", rounds=1, local=Training(lr=0.01, batch_size=16)), task=task, evaluate="never")
    a, b = outcome.personal("a"), outcome.personal("b")
    for name in a:
        assert torch.equal(a[name], b[name]) == name.startswith("body.")


def test_ditto_without_its_term_trains_alone() -> None:
    ditto = play(quick("ditto", lam=0.0, rounds=1))
    data = toy.SITES["c"]["train"]
    ctx, start = local(), weights("ditto")
    reply = quick("ditto", lam=0.0).train(play(quick("fedavg")).server, type(ditto.server)(start), ctx)
    rng = local()
    fit(rng, start, TRAINING, data)  # the global branch draws first
    alone, _ = fit(rng, start, TRAINING, data)
    assert toy.same(reply.state.model, alone)


def test_dittos_global_model_is_fedavgs() -> None:
    assert toy.same(play(quick("ditto")).model, play(quick("fedavg")).model)


def test_a_strong_term_holds_dittos_personal_models_at_the_global_one() -> None:
    def spread(lam: float) -> float:
        ditto = play(quick("ditto", lam=lam))
        return max(sub(model, ditto.model)["head.weight"].norm().item() for model in personal(ditto))

    assert spread(20.0) < spread(1.0) < spread(0.0)


def test_pfedsd_without_its_teacher_is_fedavg() -> None:
    plain = play(quick("pfedsd", distillation=Distillation(weight=0.0)))
    assert toy.same(plain.model, play(quick("fedavg")).model)
    assert not toy.same(play(quick("pfedsd")).model, play(quick("fedavg")).model)


def test_fine_tuning_leaves_fedavgs_global_model_alone() -> None:
    tuned = play(quick("fedavg-finetune"))
    assert toy.same(tuned.model, play(quick("fedavg")).model)
    ctx = ClientContext(toy.TASK, toy.SITES["b"], stream(0, "personalize", 0, "b"))
    assert toy.same(tuned.personal("b"), fit(ctx, tuned.model, TRAINING, toy.SITES["b"]["train"])[0])


def test_local_training_is_the_same_whoever_else_there_is() -> None:
    alone = toy.play(quick("local"), sites={"b": toy.SITES["b"]})
    assert toy.same(alone.personal("b"), play(quick("local")).personal("b"))


# WarmFed at its ends


def test_without_warm_start_and_distillation_the_global_model_is_fedavgs() -> None:
    assert toy.same(play(quick("warmfed", warm=False, distill="none")).model, play(quick("fedavg")).model)


def test_static_distillation_that_uploads_the_personal_model_is_pfedsd() -> None:
    rounds = 3
    algorithm = quick("warmfed", rounds=rounds, warm=False, distill="static", upload="personal")
    transport = InProcess(toy.workers(algorithm))
    pfedsd = play(quick("pfedsd", rounds=rounds))
    for record, other in zip(run(algorithm, toy.central(), transport), pfedsd.rounds, strict=False):
        assert record.stage == "train"
        assert toy.same(record.server.model, other.server.model)
        assert record.results()["personal"] == other.results()["personal"]
        if record.number == rounds - 1:
            assert all_same([dict(transport.state(site).personal) for site in ASIDE], personal(pfedsd))
            break


def test_one_shot_is_training_on_the_synthetic_set_alone(tmp_path: Path) -> None:
    algorithm = quick("warmfed", rounds=0, personal_gate=False)
    outcome = toy.play(algorithm, artefacts=tmp_path)
    samples = load_file(tmp_path / "synthetic" / "samples.safetensors")
    kept = select(samples, samples["kept"])
    ctx = replace(toy.central(), rng=stream(0, "warm", 0, "server"))
    torch.randint(2**62, (4,), generator=ctx.rng)  # what drawing the four sites' samples takes
    cross_predict(ctx, samples, algorithm.synthesis.filter_training)
    train = replace(ctx, rng=spawn(ctx.rng))
    start = toy.TASK.init(spawn(ctx.rng))
    model, _ = fit(train, start, algorithm.synthesis.training, {"image": kept["image"], "label": kept["label"]})
    assert toy.same(outcome.model, model)
    assert [r.stage for r in outcome.rounds] == ["adapt", "warm", "personalize"]
    own = fit(local(site="c"), model, TRAINING, toy.SITES["c"]["train"])[0]
    ctx_c = ClientContext(toy.TASK, toy.SITES["c"], stream(0, "personalize", 0, "c"))
    assert toy.same(outcome.personal("c"), fit(ctx_c, model, TRAINING, toy.SITES["c"]["train"])[0])
    assert not toy.same(outcome.personal("c"), own)


def test_the_one_shot_model_knows_the_sites_by_their_adapters_only() -> None:
    algorithm, neutral = quick("warmfed", rounds=0), toy.Means(neutral=True)
    mirrored = {
        name: {**data, "train": {**data["train"], "image": data["train"]["image"].flip(-1)}} for name, data in toy.SITES.items()
    }
    assert toy.same(toy.play(algorithm, generator=neutral, sites=mirrored).model, toy.play(algorithm, generator=neutral).model)
    assert not toy.same(toy.play(algorithm, sites=mirrored).model, play(algorithm).model)


def test_adapters_that_change_nothing_make_it_fgl() -> None:
    plain = toy.play(quick("warmfed", gate=False), generator=toy.Means(neutral=True))
    fgl = play(quick("fgl"))
    for stage, number in (("warm", 0), ("train", 0), ("train", 1)):
        assert toy.same(plain.after(stage, number).server.model, fgl.after(stage, number).server.model)
    assert plain.after("warm", 0).aggregate == fgl.after("warm", 0).aggregate
    assert not toy.same(play(quick("warmfed", gate=False)).model, fgl.model)


@pytest.mark.parametrize("before", ["none", "server", "client"])
def test_ungated_it_is_the_papers(before: str) -> None:
    """w ← Σ n_k/n·w_k, then fine-tuning on S_sub: written out for the first round."""
    algorithm = quick("warmfed", gate=False, before=before, rounds=1)
    outcome = play(algorithm)
    warm, subset = outcome.after("warm", 0).server.model, outcome.after("warm", 0).server.subset
    uploads = []
    for site, data in toy.SITES.items():
        ctx, start = ClientContext(toy.TASK, data, stream(0, "train", 0, site)), warm
        if before == "client":
            start, _ = fit(ctx, start, algorithm.before_training, subset)
        uploads.append((fit(ctx, start, TRAINING, data["train"])[0], float(rows(data["train"]))))
    server = replace(toy.central(), rng=stream(0, "train", 0, "server"))
    if before == "server":
        uploads = [(fit(server, model, algorithm.before_training, subset)[0], weight) for model, weight in uploads]
    tuned, _ = fit(server, mean(uploads), algorithm.tune_training, subset)
    assert toy.same(outcome.model, tuned)
    assert outcome.after("train", 0).aggregate["gate_strength"] == 1


@pytest.mark.parametrize("sample", [1.0, 0.5])
def test_each_site_gets_the_subset_once(sample: float) -> None:
    algorithm = quick("warmfed", before="client", rounds=3, client_fraction=sample)
    tap = toy.Tap(InProcess(toy.workers(algorithm)))
    list(run(algorithm, toy.central(), tap, evaluate="never"))
    sent = [(site, down.subset is not None) for stage, site, down, _, _ in tap.seen if stage == "train"]
    seen: set[str] = set()
    for site, subset in sent:
        assert subset == (site not in seen)  # a site that was not asked in the first round gets it when it is
        seen.add(site)


# the gate


def verdicts(*found: dict[str, list[float]], counts: tuple[int, ...] = (20, 20, 0)) -> dict[str, Reply]:
    """Return votes with these right answers of the first classes, of so many images."""

    def vote(right: dict[str, list[float]]) -> ValidationVote:
        each = {s: torch.tensor([*r, *[0.0] * (toy.CLASSES - len(r))], dtype=torch.float64) for s, r in right.items()}
        return ValidationVote(each, {s: -sum(r) for s, r in right.items()}, counts)

    return {str(i): Reply(vote(right), None, float(sum(counts)), {}) for i, right in enumerate(found)}


def shares(none: list[float], half: list[float], all_: list[float]) -> dict[str, list[float]]:
    return {"0.0": none, "0.5": half, "1.0": all_}


@pytest.mark.parametrize(
    ("found", "strength"),
    [
        ([shares([5, 5], [4, 5], [5, 4]), shares([5, 5], [5, 5], [5, 5])], 0.0),
        ([shares([5, 5], [6, 6], [4, 5]), shares([5, 5], [4, 5], [6, 5])], 0.5),
        ([shares([5, 5], [6, 6], [9, 10]), shares([5, 5], [4, 5], [4, 5])], 1.0),
        ([shares([5, 5], [5, 5], [5, 5])], 0.0),
    ],
)
def test_the_gate_follows_the_right_answers(found: list, strength: float) -> None:
    outcome = play(quick("warmfed"))
    server = replace(outcome.server, model=weights("average"), tuned=weights("tuned"))
    decided, metrics = outcome.algorithm.decide(server, verdicts(*found), toy.central())
    assert metrics["gate_strength"] == strength
    assert metrics["gate_kept"] == float(strength > 0)
    assert metrics["validation_after"] >= metrics["validation_before"]
    assert toy.same(decided.model, mix(server.model, server.tuned, strength))
    assert decided.tuned is None


def test_classes_count_the_same_at_the_gate_and_lacking_ones_have_no_vote() -> None:
    outcome = play(quick("warmfed"))
    server = replace(outcome.server, model=weights("average"), tuned=weights("tuned"))
    common, rare = (90, 0, 0), (0, 10, 0)
    # the tuned model loses 4 of 90 images of the common class and gains 1 of 10 of the rare one
    votes = verdicts(shares([80], [80], [76]), counts=common)
    votes["rare"] = verdicts(shares([0, 5], [0, 5], [0, 6]), counts=rare)["0"]
    _, metrics = outcome.algorithm.decide(server, votes, toy.central())
    assert metrics["gate_strength"] == 1.0
    assert metrics["validation_before"] == pytest.approx((100 * 80 / 90 + 50) / 2)
    assert metrics["validation_after"] == pytest.approx((100 * 76 / 90 + 60) / 2)


@pytest.mark.parametrize("lr", [0.01, 0.5, 5.0])
def test_the_gate_never_lowers_the_sites_validation_accuracy(lr: float) -> None:
    outcome = toy.play(quick("warmfed", tune_training=Training(lr=lr)))
    decided = [r for r in outcome.rounds if r.stage == "gate"]
    assert len(decided) == 2
    for record in decided:
        merged = outcome.after("train", record.number).server.model
        everything = join([data["validation"] for data in toy.SITES.values()])
        right = [toy.TASK.metrics(model, everything)["balanced_accuracy"] for model in (merged, record.server.model)]
        assert right[1] >= right[0] - 1e-9  # one image is 1.7; less is the rounding of the sum
        assert record.aggregate["validation_before"] == pytest.approx(right[0])
        assert record.aggregate["validation_after"] == pytest.approx(right[1])


@pytest.mark.parametrize("lr", [0.01, 5.0])
def test_a_sites_own_gate_never_lowers_its_validation_accuracy(lr: float) -> None:
    outcome = toy.play(quick("warmfed", personal=Training(lr=lr)))
    strengths = outcome.rounds[-1].train
    for site, data in toy.SITES.items():
        before, after = (
            toy.TASK.metrics(model, data["validation"])["accuracy"] for model in (outcome.model, outcome.personal(site))
        )
        assert after >= before
        assert strengths[site]["personal_strength"] in (0.0, 0.5, 1.0)


# the synthetic set


def test_samples_are_drawn_by_plan_and_named_by_site() -> None:
    ctx = replace(toy.central(), rng=stream("draw"))
    adapters = {site: toy.Means().adapt(local(site=site))[0] for site in "ab"}
    table = draw(ctx, adapters, {"a": (0, 2), "b": (1,)}, 3)
    assert table["label"].tolist() == [0, 0, 0, 2, 2, 2, 1, 1, 1]
    assert table["site"].tolist() == [0] * 6 + [1] * 3
    alone = draw(replace(toy.central(), rng=stream("draw")), {"a": adapters["a"]}, {"a": (0, 2)}, 3)
    assert torch.equal(alone["image"], table["image"][:6])
    with pytest.raises(InputError, match="needs a generator"):
        draw(toy.central(generator=None), adapters, {"a": (0,), "b": (0,)}, 1)


def test_samples_look_like_the_site_of_their_adapter() -> None:
    labels, ctx, generator = torch.arange(60) % 3, toy.central(), toy.Means(noise=1.0)
    adapters = {site: toy.Means().adapt(local(site=site))[0] for site in "ad"}
    light = {site: generator.synthesize(a, toy.PROMPTS, labels, ctx).float().mean().item() for site, a in adapters.items()}
    real = {site: toy.SITES[site]["train"]["image"].float().mean().item() for site in "ad"}
    assert light == pytest.approx(real, abs=6)
    assert abs(light["a"] - light["d"]) > 20


def test_a_subset_is_even_over_sites_and_classes() -> None:
    label = torch.tensor([0] * 10 + [1] * 2 + [0] * 3 + [1] * 9)
    table = {"label": label, "site": torch.tensor([0] * 12 + [1] * 12), "row": torch.arange(24)}
    part = balanced_subset(table, 10, stream("even"))
    counts = [int(((part["site"] == s) & (part["label"] == c)).sum()) for s in (0, 1) for c in (0, 1)]
    assert sorted(counts) == [2, 2, 3, 3]
    assert part["row"].tolist() == sorted(part["row"].tolist())
    assert rows(balanced_subset(table, 100, stream("even"))) == 24


def test_the_filter_drops_what_nobody_recognises(tmp_path: Path) -> None:
    """One adapter draws the class 2 like its class 0."""
    adapters = {site: dict(toy.Means().adapt(local(site=site))[0]) for site in "abc"}
    adapters["b"] = {"shift": adapters["b"]["shift"].clone()}
    adapters["b"]["shift"][2] -= 50 * toy.pattern(2).half() - 50 * toy.pattern(0).half()
    classes = dict.fromkeys(adapters, (0, 1, 2))
    settings = Synthesis(
        per_class=30, min_class_probability=0.5, filter_training=Training(lr=0.03, epochs=4), training=TRAINING, subset=30
    )
    ctx = replace(toy.central(generator=toy.Means(noise=20.0), folder=tmp_path), rng=stream("filter"))
    warm = warm_start(ctx, adapters, classes, settings)
    model, subset, metrics = warm.model, warm.subset, warm.metrics
    samples = load_file(tmp_path / "synthetic" / "samples.safetensors")
    assert metrics["recognised/b"] < 0.8 < 0.9 < min(metrics["recognised/a"], metrics["recognised/c"])
    assert metrics["samples"] == 270
    assert metrics["kept"] == samples["kept"].sum() == sum(metrics[f"kept/{site}"] for site in "abc")
    dropped, mirrored = ~samples["kept"], (samples["site"] == 1) & (samples["label"] == 2)
    assert dropped[mirrored].float().mean() > 0.5 > 0.1 > dropped[~mirrored].float().mean()
    assert rows(subset) == 30
    assert model.keys() == toy.TASK.init(stream(0)).keys()
    everything = warm_start(replace(ctx, rng=stream("filter")), adapters, classes, replace(settings, filter="none")).metrics
    assert everything["kept"] == 270
    assert everything["recognised/b"] == metrics["recognised/b"]
    lenient = warm_start(
        replace(ctx, rng=stream("filter")), adapters, classes, replace(settings, min_class_probability=0.0)
    ).metrics
    assert lenient["kept"] == 270


def test_a_damaged_adapter_is_refused_and_names_its_site() -> None:
    check = quick("warmfed").stages()[0].check
    check(Reply(toy_adapter(1.0), None, 1.0, {}), "ink", toy.central())
    with pytest.raises(InputError, match="adapter of site 'ink'"):
        check(Reply(toy_adapter(torch.nan), None, 1.0, {}), "ink", toy.central())


def toy_adapter(value: float) -> object:
    from warmfed.algorithms.warmfed import Adapter

    return Adapter({"shift": torch.full((3, 3, 8, 8), value)}, (0, 1, 2))


@pytest.mark.parametrize(
    "settings", [{"before": "both"}, {"distill": "dynamical"}, {"upload": "global"}, {"synthesis": {"filter": "oracle"}}]
)
def test_settings_that_cannot_be_are_refused(settings: dict) -> None:
    with pytest.raises(InputError, match="must be"):
        WarmFed(**{name: Synthesis(**value) if name == "synthesis" else value for name, value in settings.items()})
