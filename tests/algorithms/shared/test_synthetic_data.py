"""Synthetic data: which samples are drawn, with which prompts, and which of them are kept."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import toy
from safetensors.torch import load_file

from warmfed.algorithms.shared.synthetic_data import Synthesis, draw, labelled, repeated, sample_hard, warm_start
from warmfed.core import ClientContext, prompt, prompts_of
from warmfed.core.rng import stream
from warmfed.core.tensors import Table, Tensors
from warmfed.core.training import Training
from warmfed.utils.errors import InputError

SITED = ("{site|a=a|b=a} left bar", "a middle bar", "{site|a=a|b=a} right bar")


def adapters() -> dict[str, dict[str, torch.Tensor]]:
    ctx = {site: ClientContext(toy.TASK, toy.SITES[site], stream(site), site, toy.PROMPTS) for site in "ab"}
    return {site: dict(toy.Means().adapt(local)[0]) for site, local in ctx.items()}


def test_a_prompt_names_class_and_site() -> None:
    template = "a {site|real=photo|quickdraw=line drawing} of a {class}"
    told = (prompt(template, "ice_cream"), prompt(template, "zebra"))
    assert prompts_of("real", told) == ("a photo of a ice cream", "a photo of a zebra")
    assert prompts_of("quickdraw", told)[1] == "a line drawing of a zebra"
    assert prompts_of("oil_painting", told)[1] == "a oil painting of a zebra"
    assert prompts_of("", told)[1] == "a photo of a zebra"
    assert prompt("a photo of a {}", "ice_cream") == "a photo of a ice_cream"
    assert prompts_of("real", ["a photo of a {}"]) == ("a photo of a {}",)


def test_sites_and_server_use_the_prompts_of_the_site() -> None:
    """The toy generator supports only three texts; any other raises an error."""
    workers = toy.workers(toy.quick("warmfed"))
    worker = replace(workers["a"], prompts=SITED)
    assert worker.local("adapt", 0).prompts == toy.PROMPTS
    classes = {"a": (0, 2), "b": (1, 2)}
    plain = draw(replace(toy.central(), rng=stream("draw")), adapters(), classes, 2)
    sited = draw(replace(toy.central(), rng=stream("draw"), prompts=SITED), adapters(), classes, 2)
    assert torch.equal(plain["image"], sited["image"])


def test_more_samples_go_where_they_are_doubtful_or_rare() -> None:
    # site a holds the classes 0 and 1, site b holds 1 only: class 0 is rare, and a's class 1 doubtful
    samples = {"site": torch.tensor([0, 0, 0, 0, 1, 1]), "label": torch.tensor([0, 0, 1, 1, 1, 1])}
    probability = torch.tensor([0.9, 0.9, 0.2, 0.4, 0.9, 0.9])
    more = sample_hard(samples, probability, {"a": None, "b": None}, 100)
    # doubts 0.1, 0.7, 0.1, by 1, 2 and 2 holders: 0.1, 0.35 and 0.05 of 0.5
    assert {site: label.bincount(minlength=2).tolist() for site, label in more.items()} == {"a": [20, 70], "b": [0, 10]}


def test_a_focus_asks_for_no_more_samples_in_all(tmp_path: Path) -> None:
    folder, drawn = tmp_path, adapters()
    drawn["b"] = {"shift": drawn["b"]["shift"].clone()}
    drawn["b"]["shift"][2] -= 50 * toy.pattern(2).half() - 50 * toy.pattern(0).half()  # class 2 looks like class 0
    settings = Synthesis(
        per_class=20, hard_fraction=0.5, filter_training=Training(lr=0.03, epochs=4), training=toy.TRAINING, subset=12
    )
    ctx = replace(toy.central(generator=toy.Means(noise=20.0), folder=folder), rng=stream("focus"))
    metrics = warm_start(ctx, drawn, dict.fromkeys(drawn, (0, 1, 2)), settings).metrics
    samples = load_file(folder / "synthetic" / "samples.safetensors")
    assert metrics["samples"] == 120 == len(samples["label"])
    count = [[int(((samples["site"] == s) & (samples["label"] == c)).sum()) for c in range(3)] for s in range(2)]
    assert min(min(row) for row in count) >= 10
    # every confused sample is of class 2 at b, or looks like it
    assert count[1][2] > 20 > min(count[0])


def test_what_is_drawn_twice_counts_once() -> None:
    image = torch.zeros(5, 3, 16, 16, dtype=torch.uint8)
    image[1:3] = 100
    image[2, :, 0, 0] = 150  # hardly another picture
    image[3], image[4] = 102, 100
    samples = {"image": image, "label": torch.tensor([0, 0, 0, 0, 1])}
    assert repeated(samples, 3.0).tolist() == [False, False, True, True, False]
    assert repeated(samples, 1.5).tolist() == [False, False, False, False, False]
    assert repeated(samples, 300.0).tolist() == [False, True, True, True, False]


def test_soft_labels_are_part_prompt_and_part_belief() -> None:
    samples = {"image": torch.zeros(2, 3, 8, 8), "label": torch.tensor([0, 2])}
    belief = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.2, 0.6]])
    assert labelled(samples, belief, 0.0).keys() == {"image", "label"}
    assert torch.allclose(labelled(samples, belief, 0.5)["target"], torch.tensor([[0.75, 0.25, 0], [0.1, 0.1, 0.8]]))
    samples["image"] = torch.zeros(2, *toy.SHAPE, dtype=torch.uint8)
    batch = labelled(samples, F.one_hot(samples["label"], 3).float(), 1.0)
    net = toy.TASK.build()
    hard = toy.TASK.loss(net, {name: batch[name] for name in ("image", "label")})
    assert torch.allclose(toy.TASK.loss(net, batch), hard)


def test_a_warm_start_on_soft_labels(tmp_path: Path) -> None:
    def start(soft: float) -> tuple[Tensors, Table]:
        quick = Synthesis(
            per_class=8, soft_label_weight=soft, filter_training=Training(lr=0.03, epochs=4), training=toy.TRAINING, subset=12
        )
        ctx = replace(toy.central(generator=toy.Means(noise=20.0)), rng=stream("soft"))
        found = warm_start(ctx, adapters(), dict.fromkeys(adapters(), (0, 1, 2)), quick)
        return found.model, found.subset

    (hard, plain), (model, subset) = start(0.0), start(0.7)
    assert not toy.same(hard, model)
    assert all(torch.equal(subset[name], plain[name]) for name in plain)
    assert torch.allclose(subset["target"].sum(1), torch.ones(12))
    assert 0.3 <= subset["target"].gather(1, subset["label"][:, None]).min() < 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"hard_fraction": 1.0},
        {"hard_fraction": -0.1},
        {"dedup_distance": -1.0},
        {"min_class_probability": 1.0},
        {"soft_label_weight": 1.1},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="min_class_probability and hard_fraction must be"):
        Synthesis(**wrong)
