"""Sites that lack classes: training and validation lose them, the tests keep them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import refused

from warmfed.data import Federation, hold_classes, load
from warmfed.utils.errors import InputError


@pytest.fixture(scope="module")
def digits() -> Federation:
    return load("digits4")


def held(federation: Federation, part: str = "train") -> dict[str, set[int]]:
    return {name: set(site.splits[part]["label"].tolist()) for name, site in federation.sites.items()}


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 10), st.integers(0, 5))
def test_each_site_holds_so_many_classes_and_every_class_is_held(digits: Federation, count: int, seed: int) -> None:
    found = hold_classes(digits, classes_per_site=count, seed=seed)
    sites = held(found)
    assert {len(classes) for classes in sites.values()} == {count}
    held_by = [sum(label in classes for classes in sites.values()) for label in range(10)]
    assert max(held_by) - min(held_by) <= 1
    assert held(found, "validation") == sites
    for name, site in found.sites.items():
        assert torch.equal(site.test["image"], digits.sites[name].test["image"])
        for part in ("train", "validation"):
            whole = digits.sites[name].splits[part]
            mask = torch.isin(whole["label"], torch.tensor(sorted(sites[name])))
            assert torch.equal(site.splits[part]["image"], whole["image"][mask])


def test_all_classes_are_the_same_federation(digits: Federation) -> None:
    assert hold_classes(digits, classes_per_site=10).fingerprint == digits.fingerprint
    assert hold_classes(digits, classes={"ink": list(digits.classes)}).fingerprint == digits.fingerprint


def test_lists_by_site_from_a_configuration(digits: Federation) -> None:
    found = load("digits4", held={"classes": {" ink": ["zero", "one ", "two"], "street": ["nine", "zero"]}})
    sites = held(found)
    assert (sites["ink"], sites["street"], len(sites["paper"])) == ({0, 1, 2}, {0, 9}, 10)
    (note,) = [note for note in found.notes if "'street'" in note]
    assert note == "site 'street' holds 2 classes; its test has also one, two, three, four, five, six, seven, eight"


def test_dirichlet_shares_keep_a_part_of_each_class(digits: Federation) -> None:
    found = hold_classes(digits, alpha=0.3, seed=1)
    again = hold_classes(digits, alpha=0.3, seed=1)
    assert found.fingerprint == again.fingerprint != hold_classes(digits, alpha=0.3, seed=2).fingerprint
    for label in range(10):
        whole = {name: int((site.train["label"] == label).sum()) for name, site in digits.sites.items()}
        kept = {name: int((site.train["label"] == label).sum()) for name, site in found.sites.items()}
        assert any(kept[name] == whole[name] for name in whole)
        assert all(kept[name] <= whole[name] for name in whole)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "needs one of classes_per_site, alpha and classes; got none"),
        ({"classes_per_site": 3, "alpha": 1.0}, "got classes_per_site, alpha"),
        ({"classes_per_site": 1}, "expected classes_per_site from 2 to 10, got 1"),
        ({"classes_per_site": 11}, "got 11"),
        ({"classes_per_site": -3}, "from 2"),
        ({"alpha": float("nan")}, "a finite alpha above 0"),
        ({"alpha": 1e-9}, "too small"),
        ({"classes_per_site": 3, "seed": -1}, "seed"),
        ({"classes": {"inc": ["zero", "one"]}}, "names the site 'inc'; did you mean 'ink'?"),
        ({"classes": {"ink": ["zero", "won"]}}, "there is no class 'won'"),
        ({"classes": {"ink": ["zero"]}}, "needs two classes"),
        ({"classes": {"ink": "zero"}}, "must be a list of classes"),
        ({"classes": {"ink": ["zero", "zero "]}}, "names 'zero' twice"),
        ({"classez": 3}, "has no option 'classez'"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], told: str) -> None:
    refused(lambda: load("digits4", held=options), told)


def test_a_table_is_expected() -> None:
    with pytest.raises(InputError, match="held must be a table"):
        load("digits4", held=3)
