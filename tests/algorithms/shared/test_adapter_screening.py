"""Screening of adapters: a site with a poisoned adapter is excluded, honest sites never are."""

from dataclasses import replace
from typing import Any

import pytest
import report_folders
import torch
import toy
from faulty import Faulty

from warmfed.algorithms.shared.adapter_screening import contradicted, favourites, gradients, late_suspects, suspects, votes
from warmfed.algorithms.shared.synthetic_data import Synthesis, draw, warm_start
from warmfed.config import parse
from warmfed.core import Failure, Reply, Round, ServerContext
from warmfed.core.admission import AdmissionPolicy
from warmfed.core.rng import stream
from warmfed.core.tensors import Table, Tensors, join, select
from warmfed.core.training import Training
from warmfed.data.readers.digits4 import digits4
from warmfed.report import write
from warmfed.run import run
from warmfed.runs.console import line
from warmfed.transports.in_process import InProcess
from warmfed.utils.errors import InputError

SETTINGS = Synthesis(per_class=40, filter_training=Training(lr=0.02, epochs=3), training=Training(lr=0.02, epochs=4), subset=36)


def rolled(adapter: Tensors) -> Tensors:
    """The prompt of class i samples images of class i + 1 of this site."""
    base = toy.Means().base(toy.PROMPTS)
    return {"shift": ((base + adapter["shift"].float()).roll(-1, 0) - base).half()}


def adapters(sites: str, liars: str = "") -> dict[str, Tensors | None]:
    found = {}
    for number, name in enumerate(sites):
        ctx = replace(toy.central(), rng=stream("adapt", name))
        data = toy.site(number % 4)
        local: Any = type("Ctx", (), {"prompts": toy.PROMPTS, "data": data, "rng": ctx.rng})
        honest = toy.Means().adapt(local)[0]
        found[name] = rolled(honest) if name in liars else honest
    return found


def central() -> ServerContext:
    return replace(toy.central(generator=toy.Means(noise=8.0)), rng=stream("poison"))


def warmed(found: dict[str, Tensors | None], **changes: Any) -> tuple[Tensors, Table, dict[str, float]]:
    warm = warm_start(central(), found, dict.fromkeys(found, (0, 1, 2)), replace(SETTINGS, **changes))
    model, subset, metrics = warm.model, warm.subset, warm.metrics
    return model, subset, dict(metrics)


def aside(metrics: dict[str, float]) -> list[str]:
    return sorted(key.removeprefix("set_aside/") for key in metrics if key.startswith("set_aside/"))


def right(model: Tensors) -> float:
    return toy.TASK.metrics(model, join([site["test"] for site in toy.SITES.values()]))["accuracy"]


@pytest.mark.parametrize("liar", "abcd")
def test_an_adapter_with_rolled_labels_is_set_aside_by_name(liar: str) -> None:
    model, _, metrics = warmed(adapters("abcd", liar))
    assert aside(metrics) == [liar]
    assert metrics[f"contradicted/{liar}"] > 0.6
    assert metrics["samples"] == 360
    assert (metrics[f"samples/{liar}"], metrics[f"kept/{liar}"]) == (120, 0)
    assert f"recognised/{liar}" not in metrics
    trusting, _, before = warmed(adapters("abcd", liar), contradicted=0.0)
    assert before[f"kept/{liar}"] > 40, "the filter alone keeps many of them"
    assert right(model) > right(trusting)


def test_its_samples_are_not_in_the_subset() -> None:
    ctx, found = central(), adapters("abcd", "c")
    whole = draw(ctx, found, dict.fromkeys(found, (0, 1, 2)), SETTINGS.per_class)
    liars = {image.numpy().tobytes() for image in whole["image"][whole["site"] == 2]}
    drawn = {image.numpy().tobytes() for image in whole["image"]}
    used = {image.numpy().tobytes() for image in warmed(found)[1]["image"]}
    assert used <= drawn
    assert not used & liars


@pytest.mark.parametrize("sites", ["ab", "abc", "abcd", "abcde"])
def test_honest_sites_change_nothing(sites: str) -> None:
    (model, subset, metrics), (same, table, plain) = warmed(adapters(sites)), warmed(adapters(sites), contradicted=0.0)
    assert toy.same(model, same)
    assert toy.same(subset, table)
    assert metrics == plain


def test_two_sites_cannot_tell_which_of_them_is_wrong() -> None:
    assert aside(warmed(adapters("ab", "b"))[2]) == []


def test_one_of_three_is_found() -> None:
    assert aside(warmed(adapters("abc", "b"))[2]) == ["b"]


def test_half_of_the_sites_cannot_have_the_other_half_set_aside() -> None:
    metrics = warmed(adapters("abcd", "ad"))[2]
    assert aside(metrics) == []
    assert metrics["disputed"] == 1
    assert metrics["samples"] == 480
    assert aside(warmed(adapters("abcde", "ae"))[2]) == ["a", "e"]


def test_a_federation_of_real_images_with_four_looks() -> None:
    """With training images as samples, every poisoned site is found and no honest one."""
    for alpha in (None, 0.3):
        sites = digits4(alpha=alpha).sites
        tables = [{**site.train, "site": torch.full_like(site.train["label"], i)} for i, site in enumerate(sites.values())]
        assert suspects(join(tables), tuple(sites), 0.4) == ((), {})
        for i, name in enumerate(sites):
            turned = [{**t, "label": (t["label"] - 1) % 10} if i == j else t for j, t in enumerate(tables)]
            found, metrics = suspects(join(turned), tuple(sites), 0.4)
            assert set(found) <= {name}, "nobody else"
            if alpha is None:
                assert found == (name,)
                assert metrics[f"contradicted/{name}"] == 1
                half = [
                    {**t, "label": torch.where(t["label"] < 5, (t["label"] - 1) % 5, t["label"])} if i == j else t
                    for j, t in enumerate(tables)
                ]
                assert suspects(join(half), tuple(sites), 0.4)[0] == (name,)


def test_sites_that_share_no_class_with_two_others_are_not_judged() -> None:
    held = ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [0, 2, 4, 6, 8], [1, 3, 5, 7, 9])
    tables = []
    for i, (site, classes) in enumerate(zip(digits4().sites.values(), held, strict=True)):
        mine = select(site.train, torch.isin(site.train["label"], torch.tensor(classes)))
        tables.append({**mine, "site": torch.full_like(mine["label"], i)})
    assert suspects(join(tables), "abcd", 0.4) == ((), {})


def test_opinions_by_hand() -> None:
    label = torch.arange(3).repeat_interleave(10)
    assert favourites(label, label, [0, 1, 2]) == {0: 0, 1: 1, 2: 2}
    assert favourites((label + 1) % 3, label, [0, 1, 2]) == {0: 1, 1: 2, 2: 0}
    assert favourites(torch.zeros_like(label), label, [0, 1, 2])[1] in (1, -1), "one answer to all is no opinion"
    assert favourites(label, label, [1, 2]) == {1: 1, 2: 2}
    assert favourites(label, label, [7]) == {}
    wrong, own = {0: 1, 1: 2, 2: 0}, {0: 0, 1: 1, 2: 2}
    assert contradicted([wrong, wrong, own]) == 1
    assert contradicted([wrong, own]) == 0
    assert contradicted([wrong, {0: 2, 1: 0, 2: 1}, own]) == 0, "they do not agree on another class"
    assert contradicted([wrong]) == 0, "one judge is too few"
    assert contradicted([{**own, 0: 1}] * 3) == 0, "one class alone"


def test_the_descriptor_does_not_depend_on_colour_or_polarity() -> None:
    image = torch.randint(60, 120, (4, 3, 32, 32), dtype=torch.uint8, generator=stream("image"))
    seen = gradients(image)
    assert seen.shape == (4, 576)
    assert torch.allclose(gradients(255 - image), seen)
    assert torch.allclose(gradients(2 * image), seen, atol=1e-6)
    assert torch.allclose(gradients(image[:, [2, 0, 1]]), seen)
    assert torch.equal(gradients(image, batch=3), seen)
    assert votes(seen, torch.tensor([0, 1, 3, 3]), seen).tolist() == [0, 1, 3, 3]


def test_in_a_run_the_record_the_terminal_and_the_report_name_the_site(tmp_path: Any) -> None:
    found = lying({(0, "b"): lambda reply: told_again(reply)})
    metrics = dict(found[1].aggregate)
    assert aside(metrics) == ["b"]
    assert found[1].server.classes["b"].numel() == 0
    assert "set aside: b" in line({**found[1].results(), "seconds": 1.0})
    told = {"samples": 40, "kept": 30, "samples/ink": 40, "kept/ink": 30, "samples/street": 40, "kept/street": 0}
    told |= {"contradicted/street": 1.0, "contradicted/ink": 0.0, "set_aside/street": 1.0}
    rounds = [r | {"aggregate": told} if r["stage"] == "warm" else r for r in report_folders.WARMFED]
    folder = report_folders.run_folder(tmp_path, rounds)
    write(folder, report_folders.SUMMARY)
    page = (folder / "report.html").read_text()
    assert "set aside" in page


def told_again(reply: Reply) -> Reply:
    return replace(reply, message=replace(reply.message, adapter=rolled(reply.message.adapter)))


def lying(faults: dict[tuple[int, str], Any]) -> list[Round]:
    algorithm = toy.quick("warmfed", synthesis=SETTINGS)
    transport = Faulty(InProcess(toy.workers(algorithm, generator=toy.Means(noise=8.0))), faults)
    return list(run(algorithm, toy.central(generator=toy.Means(noise=8.0)), transport, admission=AdmissionPolicy(min_sites=3)))


def test_a_late_site_is_judged_too() -> None:
    away, late = {(0, "d"): lambda reply: Failure("it is not connected")}, (2, "d")
    honest, liar = lying(dict(away)), lying({**away, late: told_again})
    assert aside(dict(honest[2].aggregate)) == []
    assert honest[2].aggregate["joined_samples"] > 0
    assert aside(dict(liar[2].aggregate)) == ["d"]
    assert liar[2].aggregate["joined_samples"] == 0
    assert toy.same(liar[2].server.subset, liar[1].server.subset)
    assert next(sent.kind for sent in liar[4].exchanges if sent.site == "d") == "warmfed.Down", "it is not asked again"


def test_late_samples_against_one_class_are_not_judged() -> None:
    image = torch.randint(0, 255, (4, 3, 8, 8), dtype=torch.uint8, generator=stream("late"))
    one = {"image": image, "label": torch.zeros(4, dtype=torch.int64)}
    assert late_suspects({**one, "site": torch.zeros(4, dtype=torch.int64)}, ("d",), one, 0.4) == ((), {})


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_limit_that_is_no_share_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="contradicted must be from 0 to 1"):
        parse(None, {"algorithm.synthesis.contradicted": value})
