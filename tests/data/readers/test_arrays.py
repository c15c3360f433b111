"""Numbers in arrays that mean something else than they say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import refused

from warmfed.data import arrays, npz
from warmfed.utils.errors import InputError

IMAGES = np.random.RandomState(0).randint(0, 256, (40, 8, 8, 3)).astype(np.uint8)
LABELS = np.arange(40) % 2
DOMAINS = np.array(["ink", "paper"])


@pytest.mark.parametrize(
    ("domain", "told"),
    [
        (np.arange(40) % 2 - 1, "from 0 to 1, got -1 to 0"),
        (np.arange(40) % 2 + 1, "from 0 to 1, got 1 to 2"),
        ((np.arange(40) % 2).astype(float), "got float64 [40]"),
        (np.arange(30) % 2, "'domain' has 30 numbers, 'x' [40] images"),
        ((np.arange(40) % 2).reshape(20, 2), "got int64 [20, 2]"),
        (np.array(["0"] * 40), "got <U1 [40]"),
        (np.full(40, 2**63, np.uint64), "number them from 0"),
    ],
)
def test_sites_by_number_must_be_places_in_their_names(domain: Any, told: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=IMAGES, y=LABELS, domain=domain, domains=DOMAINS)
    refused(lambda: npz(tmp_path / "x.npz"), told)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-2, 3), min_size=40, max_size=40), st.sampled_from([np.int8, np.int64, np.float32]))
def test_any_site_numbers(tmp_path_factory: pytest.TempPathFactory, numbers: list[int], kind: Any) -> None:
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    np.savez(path, x=IMAGES, y=LABELS, domain=np.array(numbers, kind), domains=DOMAINS)
    try:
        federation = npz(path)
    except InputError:
        return
    assert kind is not np.float32
    assert set(numbers) <= {0, 1}
    rows = {site: sum(counts.values()) for site, counts in federation.rows.items()}
    assert rows == {str(DOMAINS[i]): numbers.count(i) for i in set(numbers)}


def test_names_of_any_kind(tmp_path: Path) -> None:
    domain = np.arange(40) // 20
    np.savez(
        tmp_path / "x.npz", x=IMAGES, y=LABELS, domain=domain, domains=np.array([" ink", b"paper"]), classes=np.array([3, 5])
    )
    federation = npz(tmp_path / "x.npz")
    assert (list(federation.sites), federation.classes) == (["ink", "paper"], ("3", "5"))
    np.savez(tmp_path / "y.npz", x=IMAGES, y=LABELS, domain=domain, domains=np.array([0.5, 1.5]))
    refused(lambda: npz(tmp_path / "y.npz"), "expected 'domains' as texts")


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (np.array([20240115, 20991231])[LABELS], "the labels 20240115, 20991231 leave"),
        (np.array([5, 905])[LABELS], "leave 904 of 906 classes empty"),
        (LABELS - 1, "expected labels from 0 to 2147483647, got -1 to 0"),
        (np.where(LABELS, np.uint64(2**63 + 1), np.uint64(0)), "expected labels from 0"),
    ],
)
def test_labels_that_are_identifiers_are_refused(labels: Any, told: str) -> None:
    refused(lambda: arrays({"a": (IMAGES, labels)}), told)


def test_an_empty_site_may_be_left_out_by_the_choice_of_sites() -> None:
    sites = {"a": (IMAGES, LABELS), "b": (IMAGES[:0], LABELS[:0]), "c": (IMAGES.astype(int), LABELS)}
    assert list(arrays(sites, sites=["a"]).sites) == ["a"]
    refused(lambda: arrays(sites, sites=["d"]), "there is no site 'd'")
    refused(lambda: arrays(sites, sites=["a", "b"]), "site 'b'")
    refused(lambda: arrays(sites, sites=[1]), "must be a list of texts")
