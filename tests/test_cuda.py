"""Tests on a GPU: results are reproducible bit for bit, and models with a datastore move completely."""

import pytest
import torch

from warmfed import models
from warmfed.core import ServerContext
from warmfed.core.rng import seeded, stream
from warmfed.core.tensors import add_prefix, sha256
from warmfed.core.training import Training
from warmfed.fit import fit
from warmfed.tasks import Classify


def test_a_named_stream_leaves_torch_as_it_was() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.get_rng_state()
    with seeded(stream("stream")):
        torch.rand(3)
    assert torch.are_deterministic_algorithms_enabled() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_datastore_is_a_part_of_the_network() -> None:
    task = Classify((1, 8, 8), 3, "linear")
    weights = task.init(stream("start"))
    width = task.features(weights, {"image": torch.zeros(1, 1, 8, 8, dtype=torch.uint8)}).shape[1]
    store = {"features": torch.zeros(4, width), "labels": torch.zeros(4).long(), "neighbours": torch.tensor(2)}
    store |= {"scale": torch.tensor(1.0), "share": torch.tensor(0.5)}
    net = models.holding(task.build(), {**weights, **add_prefix(store, models.DATASTORE)}).to("meta")
    assert {tensor.device.type for tensor in (*net.parameters(), *net.buffers())} == {"meta"}
    assert len(list(net.buffers())) >= len(store)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no graphics card")
def test_training_on_a_card_repeats_itself() -> None:
    task = Classify((3, 32, 32), 3, "resnet18")
    table = {"image": torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8), "label": torch.arange(64) % 3}
    found = set()
    for _ in range(2):
        ctx = ServerContext(task, stream("card"), device="cuda")
        found.add(sha256(fit(ctx, task.init(stream("start")), Training(epochs=2), table)[0]))
    assert len(found) == 1
