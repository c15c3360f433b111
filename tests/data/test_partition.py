"""A partition has as many sites as asked, all with images, or is refused."""

import warnings
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import picture, refused

from warmfed.data import arrays, partition
from warmfed.data.partition import Partition
from warmfed.utils.errors import InputError

LABELS = np.repeat(np.arange(4), 25)


@settings(max_examples=150, deadline=None)
@given(
    rule=st.sampled_from(["iid", "dirichlet", "shards", "quantity"]),
    sites=st.integers(-2, 30),
    alpha=st.floats(1e-6, 100),
    least=st.integers(-5, 40),
    held=st.integers(1, 5),
    count=st.integers(1, len(LABELS)),
)
def test_no_site_is_lost(rule: Any, sites: int, alpha: float, least: int, held: int, count: int) -> None:
    with warnings.catch_warnings(), suppress(InputError):
        warnings.simplefilter("error")
        asked = Partition(sites, rule, alpha, held, least)
        parts = asked.parts(LABELS[:count])
        assert len(parts) == sites
        assert all(len(part) for part in parts)
        assert sorted(np.concatenate(parts).tolist()) == list(range(count))
        if rule in ("dirichlet", "quantity"):
            assert min(map(len, parts)) >= least >= 1


@pytest.mark.parametrize("least", [0, -1000])
def test_a_minimum_below_one_image_is_refused(least: int) -> None:
    refused(lambda: Partition(4, "quantity", min_partition_size=least), "expected a min_partition_size of 1 image or more")


def test_shares_that_are_no_numbers_are_refused() -> None:
    refused(lambda: Partition(2, "quantity", alpha=1e-9, min_partition_size=1).parts(LABELS), "too small to draw shares")
    refused(lambda: Partition(2, "dirichlet", alpha=1e-9, min_partition_size=1).parts(LABELS), "set a larger alpha")


def test_sites_without_images_are_refused() -> None:
    few = np.array([0, 0, 1, 1, 1, 1, 1, 1])
    refused(lambda: Partition(6, "shards", classes_per_site=1).parts(few), "sites without images")
    images = np.stack([np.asarray(picture(i)) for i in range(8)])
    refused(lambda: partition(arrays({"a": (images, few)}, validation=0.25, test=0.25), 4, "iid"), "has no")
