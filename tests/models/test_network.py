"""Networks of a user's own: body and head, the part that is trained, and running statistics."""

import math
from dataclasses import replace

import own_networks
import pytest
import torch
import toy
from torch import nn

from warmfed import models
from warmfed.algorithms import ALGORITHMS
from warmfed.core.rng import stream
from warmfed.core.tensors import is_statistic, sha256
from warmfed.core.training import Training
from warmfed.fit import Problem, fit
from warmfed.tasks import Classify, classification
from warmfed.utils.errors import InputError

CLASSIFIERS = [name for name, each in ALGORITHMS.items() if "classify" in each.tasks]


def task(name: str, **settings: str) -> Classify:
    return Classify(toy.SHAPE, toy.CLASSES, f"python:own_networks:{name}", **settings)


@pytest.mark.parametrize("network", ["batch_norm", "layer_norm"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_method_trains_a_network_with_normalisation(name: str, network: str) -> None:
    algorithm = toy.quick(name)
    outcome = toy.play(algorithm, task=task(network), evaluate="last")
    held = [model for model in (algorithm.global_model(outcome.server), *map(outcome.personal, "ab")) if model is not None]
    assert held
    for model in held:
        assert all(value.is_floating_point() for key, value in model.items() if not key.startswith("datastore."))
        assert all((value >= 0).all() for key, value in model.items() if key.endswith("running_var"))
        assert all(value.isfinite().all() for value in model.values())
    if network == "batch_norm":
        assert any(is_statistic(key) for key in held[-1])


def test_frozen_statistics_are_no_part_of_the_model_and_stay() -> None:
    begun = task("batch_norm", buffers="frozen")
    start = begun.init(torch.Generator())
    assert not any(is_statistic(key) for key in start)
    model = begun.build()
    model.train()
    before = sha256(dict(model.named_buffers()))
    begun.loss(model, toy.SITES["a"]["train"])
    assert sha256(dict(model.named_buffers())) == before
    model = task("batch_norm").build()
    model.train()
    begun.loss(model, toy.SITES["a"]["train"])
    assert sha256(dict(model.named_buffers())) != before


@pytest.mark.parametrize("name", ["fedavg", "fedper", "scaffold", "warmfed"])
@pytest.mark.parametrize(("trainable", "count"), [("head", 2), ("last:1", 4), ("all", 10), ("lora", 6)])
def test_only_the_trained_part_travels(name: str, trainable: str, count: int) -> None:
    begun = task("pretrained", trainable=trainable)
    wanted = begun.init(torch.Generator()).keys()
    assert len(wanted) == count
    outcome = toy.play(toy.quick(name), task=begun, evaluate="last")
    assert outcome.personal("a").keys() == wanted
    if trainable == "head":
        assert all(line.bytes < 4000 for record in outcome.rounds for line in record.exchanges if record.stage == "train")


def test_the_frozen_part_is_the_same_for_every_seed_and_copy() -> None:
    begun = task("pretrained", trainable="head")
    first, second = begun.build(), begun.build()
    assert first.body[0].weight is second.body[0].weight
    assert first.head.weight is not second.head.weight
    heads = [begun.init(stream(seed, "init"))["head.weight"] for seed in (0, 1, 1)]
    assert not torch.equal(heads[0], heads[1])
    assert torch.equal(heads[1], heads[2])


def test_a_users_frozen_layers_stay_frozen() -> None:
    begun = task("named")
    start = begun.init(torch.Generator())
    assert not any("stem" in key for key in start)
    result, _ = fit(Problem(begun, stream("fit")), start, Training(lr=0.1, epochs=1), toy.SITES["a"]["train"])
    assert result.keys() == start.keys()
    assert not torch.equal(result["head.weight"], start["head.weight"])


def test_a_frozen_body_has_no_dropout_and_gives_the_same_features() -> None:
    begun = task("named", trainable="head")
    net = begun.build().train()
    image = toy.SITES["a"]["train"]
    assert torch.equal(begun.embed(net, image), begun.embed(net, image))


def test_features_of_a_frozen_body_are_computed_once() -> None:
    """Training and prediction on cached features equal those through the whole network."""
    begun, whole = task("pretrained", trainable="head"), task("pretrained", trainable="last:1")
    data, training = {**toy.SITES["b"]["train"]}, Training(lr=0.1, epochs=2, batch_size=16)
    data["image"] = data["image"].clone()
    start = begun.init(stream("init"))
    result, _ = fit(Problem(begun, stream("fit")), start, training, data)
    again, _ = fit(Problem(begun, stream("fit")), start, training, data)
    assert toy.same(result, again)
    assert begun.inputs(data)["feature"] is begun.inputs(data)["feature"]
    live = Problem(begun, stream("fit"))
    slow, _ = fit(replace(live, task=_Live(begun)), start, training, data)
    assert all((slow[name] - value).abs().max() < 1e-5 for name, value in result.items())
    net = models.holding(begun.build(), result)
    assert (begun.predict(result, data) - begun.logits(net, data)).abs().max() < 1e-5
    assert whole.inputs(data) is data


class _Live:
    """A task that encodes each batch anew."""

    def __init__(self, inner: Classify) -> None:
        self.task = inner

    def build(self) -> nn.Module:
        return self.task.build()

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.task.loss(model, batch)


@pytest.mark.parametrize("trainable", ["all", "head", "lora", "last:1"])
def test_the_first_training_of_a_process_equals_the_next(trainable: str) -> None:
    """The network is built once per process; that must not take random numbers from a training."""
    begun = task("named", trainable=trainable)  # it has dropout
    start = begun.init(stream("init"))
    classification._template.cache_clear()
    first, again = (
        fit(Problem(begun, stream("fit")), start, Training(lr=0.1, epochs=1), toy.SITES["a"]["train"])[0] for _ in range(2)
    )
    assert toy.same(first, again)
    before = torch.get_rng_state()
    classification._template.cache_clear()
    begun.build()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_head_without_a_bias_gets_one() -> None:
    assert torch.equal(task("without_bias").init(stream("init"))["head.bias"], torch.zeros(3))
    outcome = toy.play(toy.quick("fedncm", rounds=0), task=task("without_bias"))
    assert outcome.model.keys() == task("without_bias").init(stream("init")).keys()


def test_training_equals_a_plain_loop() -> None:
    """Fine-tuning all of a pretrained network with BatchNorm equals plain PyTorch."""
    begun = task("pretrained")
    data, training = toy.SITES["a"]["train"], Training(lr=0.05, momentum=0.0, epochs=3, batch_size=1000)
    start = begun.init(stream("init"))
    result, _ = fit(Problem(begun, stream("fit")), start, training, data)
    net = begun.build()
    net.load_state_dict(start, strict=False)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(data["image"].float() / 127.5 - 1), data["label"]).backward()
        optimizer.step()
    for name, value in result.items():
        assert (net.state_dict()[name] - value).abs().max() < 1e-5, name


def test_lora_starts_at_the_pretrained_network() -> None:
    image = toy.SITES["a"]["train"]
    outputs = []
    for trainable in ("head", "lora"):
        begun = task("pretrained", trainable=trainable)
        model = begun.init(stream("init"))
        outputs.append(begun.predict({**model, "head.weight": torch.ones(3, 12), "head.bias": torch.ones(3)}, image))
    assert torch.allclose(*outputs, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("python:own_networks:without_head", "has no linear layer with 3 outputs"),
        ("python:own_networks:after_head", "does something after its last linear layer"),
        ("python:own_networks:of_another_size", "does not take images"),
        ("python:own_networks:failing", "RuntimeError: out of ideas"),
        ("python:own_networks:number", r"returned int, expected a torch\.nn\.Module"),
        ("python:own_networks:missing", "has no function 'missing'"),
        ("python:no_such_module:f", "cannot import no_such_module"),
        ("python:own_networks", "is not python:package.module:function"),
        ("cnm", "there is no model 'cnm'"),
    ],
)
def test_what_is_no_classifier_is_refused(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        models.network(name, toy.SHAPE, toy.CLASSES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("trainable", ["heads", "last:0", "last:", ""])
def test_an_unknown_part_is_refused(trainable: str) -> None:
    with pytest.raises(InputError, match=r"model\.trainable must be all, head, lora or last:N"):
        models.check_trainable(trainable)


def test_a_network_of_the_package_can_be_trained_in_part() -> None:
    begun = Classify((3, 32, 32), 10, "cnn", trainable="head")
    assert set(begun.init(torch.Generator())) == {"head.weight", "head.bias"}
    whole = replace(begun, trainable="all")
    assert math.prod(whole.init(torch.Generator())["head.weight"].shape) == 1280


def test_a_registered_network_is_divided_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "mine", own_networks.layer_norm)
    begun = Classify(toy.SHAPE, toy.CLASSES, "mine")
    assert {"head.weight", "head.bias"} < set(begun.init(torch.Generator()))
