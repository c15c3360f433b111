"""Arithmetic on named tensors, and the names of random streams."""

import pytest
import torch

from warmfed.core.rng import numpy_stream, seeded, spawn, stream, stream_seed
from warmfed.core.tensors import add, evenly_spaced, finite, join, mean, mix, only, rows, scale, select, sha256, sub, to, zeros

A = {"w": torch.tensor([1.0, 2.0]), "steps": torch.tensor(3)}
B = {"w": torch.tensor([3.0, 6.0]), "steps": torch.tensor(5)}


def test_arithmetic_goes_by_name() -> None:
    assert add(A, B)["w"].tolist() == [4, 8]
    assert sub(B, A)["w"].tolist() == [2, 4]
    assert scale(A, 0.5)["w"].tolist() == [0.5, 1]
    assert zeros(A)["w"].tolist() == [0, 0]
    assert list(only(A, lambda name: name == "w")) == ["w"]
    assert to(A, "cpu")["w"] is A["w"]


@pytest.mark.parametrize("operation", [add, sub, lambda a, b: mix(a, b, 0.5), lambda a, b: mean([(a, 1.0), (b, 1.0)])])
def test_other_names_are_an_error(operation: object) -> None:
    with pytest.raises(KeyError, match="steps"):
        operation(A, {"w": A["w"]})


def test_the_mean_is_weighted_and_leaves_counters_alone() -> None:
    found = mean([(A, 1.0), (B, 3.0)])
    assert found["w"].tolist() == [2.5, 5.0]
    assert found["w"].dtype == torch.float32
    assert found["steps"].item() == 3


def test_the_mean_is_accumulated_in_64_bits() -> None:
    parts = [({"w": torch.tensor([value])}, 1.0) for value in (1e8, 1.0, 1.0, -1e8)]
    assert mean(parts)["w"].item() == 0.5  # in 32 bits the ones would vanish beside 1e8


def test_a_mean_in_half_precision_keeps_its_type() -> None:
    assert mean([({"w": torch.tensor([1.0]).half()}, 2.0)])["w"].dtype == torch.float16


@pytest.mark.parametrize("items", [[], [(A, 0.0)]])
def test_a_mean_of_nothing_is_an_error(items: list) -> None:
    with pytest.raises(ValueError, match="no updates"):
        mean(items)


def test_mix_ends_at_its_operands_exactly() -> None:
    a, b = {"w": torch.tensor([0.1, 0.7])}, {"w": torch.tensor([0.3, -1e-8])}
    assert torch.equal(mix(a, b, 0.0)["w"], a["w"])
    assert torch.equal(mix(a, b, 1.0)["w"], b["w"])
    assert mix(A, B, 0.5)["w"].tolist() == [2, 4]
    assert mix(A, B, 0.5)["steps"].item() == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite(dtype: torch.dtype) -> None:
    large = torch.full((100,), 6e4, dtype=dtype)  # in 16 bits their sum would overflow
    assert finite(large)
    assert finite(torch.arange(3))
    for value in (torch.nan, torch.inf, -torch.inf):
        assert not finite(torch.tensor([1.0, value], dtype=dtype))
    assert not finite(torch.tensor([torch.inf, -torch.inf], dtype=dtype))


def test_tables() -> None:
    table = {"image": torch.arange(6).view(3, 2), "label": torch.tensor([0, 1, 0])}
    assert rows(table) == 3
    assert select(table, torch.tensor([2, 0]))["image"].tolist() == [[4, 5], [0, 1]]
    assert evenly_spaced(table, 2)["image"].tolist() == [[0, 1], [4, 5]]
    assert evenly_spaced(table, 9)["label"].tolist() == table["label"].tolist()
    assert join([table, select(table, slice(1))])["label"].tolist() == [0, 1, 0, 0]
    with pytest.raises(KeyError, match="column names differ"):
        join([table, {"image": table["image"]}])


def test_the_digest_knows_names_types_shapes_and_bytes() -> None:
    base = {"w": torch.zeros(2, 3)}
    others = [
        {"v": torch.zeros(2, 3)},
        {"w": torch.zeros(3, 2)},
        {"w": torch.zeros(2, 3, dtype=torch.int32)},
        {"w": torch.zeros(2, 3).index_fill(0, torch.tensor(1), 1e-30)},
        {"w": torch.zeros(2, 3), "b": torch.tensor(True)},
        {},
    ]
    assert len({sha256(base), *map(sha256, others)}) == 7
    assert sha256({"w": torch.zeros(3, 2).T, "b": torch.ones(0)}) == sha256({"b": torch.ones(0), "w": torch.zeros(2, 3)})
    assert len(sha256({"w": torch.ones(2, dtype=torch.bfloat16)})) == 64


def test_streams_have_names_not_an_order_of_use() -> None:
    first = torch.rand(3, generator=stream(0, "train", 1, "ink"))
    assert torch.equal(first, torch.rand(3, generator=stream(0, "train", 1, "ink")))
    assert not torch.equal(first, torch.rand(3, generator=stream(0, "train", 1, "inks")))
    assert stream_seed(0, "a") != stream_seed("0", "a")
    assert numpy_stream(0, "deal").integers(1000) == numpy_stream(0, "deal").integers(1000)
    parent = stream("parent")
    assert not torch.equal(torch.rand(3, generator=spawn(parent)), torch.rand(3, generator=spawn(parent)))


def test_a_seeded_block_leaves_the_global_stream_alone() -> None:
    before = torch.get_rng_state()
    with seeded(stream("block")):
        inside = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(stream("block")):
        assert torch.equal(torch.rand(2), inside)
