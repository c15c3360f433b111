"""Metrics of classifiers against scikit-learn and torchmetrics; and the networks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from warmfed import models
from warmfed.core import ServerContext
from warmfed.core.rng import stream
from warmfed.core.training import Training
from warmfed.fit import fit
from warmfed.metrics.classification import measure
from warmfed.tasks import Classify
from warmfed.tasks.classification import pixels
from warmfed.utils.errors import InputError


@pytest.mark.parametrize("case", range(4))
def test_the_figures_are_scikit_learns_and_torchmetrics(case: int) -> None:
    rng = stream("figures", case)
    logits = 2 * torch.randn(200, 5, generator=rng)
    label = torch.randint(5, (200,), generator=rng) % (5 - case)  # fewer and fewer classes occur
    guess, probability = logits.argmax(-1), logits.double().softmax(-1)
    found = measure(logits, label)
    assert found["accuracy"] == pytest.approx(100 * accuracy_score(label, guess))
    present = label.unique()
    recall = [(guess[label == c] == c).double().mean().item() for c in present]
    assert found["balanced_accuracy"] == pytest.approx(100 * sum(recall) / len(recall))
    if case == 0:
        assert found["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(label, guess))
    assert found["macro_f1"] == pytest.approx(100 * f1_score(label, guess, average="macro"))
    assert found["ece"] == pytest.approx(100 * multiclass_calibration_error(probability, label, 5, n_bins=15).item(), abs=1e-4)
    assert found["loss"] == pytest.approx(log_loss(label, probability, labels=range(5)))
    assert found["count"] == 200


def test_a_perfect_and_sure_model() -> None:
    label = torch.tensor([0, 2, 2])
    found = measure(1000 * torch.nn.functional.one_hot(label, 3).float(), label)
    assert found == {"accuracy": 100, "balanced_accuracy": 100, "macro_f1": 100, "ece": 0, "loss": 0, "count": 3}


def test_outputs_that_are_not_finite_are_no_guess() -> None:
    with pytest.raises(InputError, match="outputs are not finite: its training diverged"):
        measure(torch.tensor([[0.0, float("nan")]]), torch.tensor([0]))


def test_pixels_span_minus_one_to_one_and_leave_the_image_alone() -> None:
    image = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert pixels(image).tolist() == pytest.approx([-1, -0.6, 1])
    assert image.tolist() == [0, 51, 255]


def test_prediction_does_not_depend_on_the_batch() -> None:
    task, table = Classify((3, 8, 8), 3), toy.SITES["a"]["test"]
    model = task.init(stream("cnn"))
    whole = task.predict(model, table)
    assert whole.shape == (48, 3)
    assert torch.allclose(whole, task.predict(model, table, batch=7), atol=1e-5)
    head = whole - task.features(model, table) @ model["head.weight"].T
    assert torch.allclose(head, model["head.bias"].expand(48, 3), atol=1e-5)


def test_the_networks() -> None:
    assert models.parameters(models.build("pfllib-cnn", (1, 28, 28), 10)) == 582_026
    assert models.parameters(models.build("linear", (3, 32, 32), 10)) == 30_730
    assert models.parameters(models.build("cnn", (3, 32, 32), 10)) == 156_298
    residual = models.build("resnet18", (3, 64, 64), 10)
    assert models.parameters(residual) == 11_176_512 + 512 * 10 + 10  # torchvision's has as many: scale and shift of each norm
    assert not list(residual.buffers())
    assert residual(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    with pytest.raises(InputError, match="no model 'cmn'; did you mean 'cnn'"):
        models.build("cmn", (3, 8, 8), 2)


def test_a_start_from_a_file(tmp_path: Path) -> None:
    path, model = tmp_path / "start.safetensors", dict(toy.TASK.init(stream("start")))
    save_file(model, path)
    task = Classify(toy.SHAPE, 3, "linear", start=str(path))
    assert toy.same(task.init(stream("other")), model)


def test_a_classifier_of_other_classes_lends_its_body(tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    lender = {name: value + 1 for name, value in replace(toy.LAYERED, classes=7).init(stream("start")).items()}
    save_file(lender, path)
    alone, begun = toy.LAYERED.init(stream("own")), replace(toy.LAYERED, start=str(path)).init(stream("own"))
    assert {name for name in begun if torch.equal(begun[name], alone[name])} == {"head.weight", "head.bias"}
    assert {name for name in begun if torch.equal(begun[name], lender[name])} == begun.keys() - {"head.weight", "head.bias"}
    save_file({**lender, "head.bias": torch.zeros(3)}, path)
    with pytest.raises(InputError, match=r"'head\.bias' differs"):
        replace(toy.LAYERED, start=str(path)).init(stream("own"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda path: save_file({"head.weight": torch.zeros(3, 192)}, path), "tensor 'head.bias' differs"),
        (
            lambda path: save_file({"head.weight": torch.zeros(3, 9), "head.bias": torch.zeros(3)}, path),
            "'head.weight' differs",
        ),
        (lambda path: path.write_bytes(b"\x80\x04]\x94."), "not a safetensors file"),
        (lambda path: None, "cannot read"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(content: object, words: str, tmp_path: Path) -> None:
    content(tmp_path / "start.safetensors")
    with pytest.raises(InputError, match=words):
        Classify(toy.SHAPE, 3, "linear", start=str(tmp_path / "start.safetensors")).init(stream("start"))


def test_the_layout_of_images_in_memory_changes_no_bit() -> None:
    """Samples from a generator and samples from a file give the same results."""
    task = Classify((3, 32, 32), 10)
    table = {"image": torch.randint(256, (64, 3, 32, 32), generator=stream("layout"), dtype=torch.uint8)}
    table["label"] = torch.arange(64) % 10
    other = {**table, "image": table["image"].contiguous(memory_format=torch.channels_last)}
    one, two = (
        fit(
            ServerContext(task, stream("layout")), task.init(stream("start")), Training(lr=0.05, epochs=2, batch_size=16), data
        )[0]
        for data in (table, other)
    )
    assert toy.same(one, two)
    assert task.predict(one, table).equal(task.predict(one, other))
