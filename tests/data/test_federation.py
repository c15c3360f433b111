"""Federation: its guarantees and its errors. Partition rules: each example once, with the requested skew."""

import numpy as np
import pytest
import torch

from warmfed.core.rng import random_state
from warmfed.data import partition
from warmfed.data.federation import Federation, Site
from warmfed.data.partition import dirichlet, iid, quantity, shards
from warmfed.utils.errors import InputError

LABELS = np.repeat(np.arange(10), 60)


def table(labels: list[int], value: int = 0, side: int = 4) -> dict[str, torch.Tensor]:
    return {"image": torch.full((len(labels), 3, side, side), value, dtype=torch.uint8), "label": torch.tensor(labels)}


def site(value: int = 0, side: int = 4) -> Site:
    return Site(table([0, 1], value, side), table([1], value, side), table([0], value, side))


def pets(**changes: object) -> Federation:
    fields = {"name": "pets", "classes": ("cat", "dog"), "template": "a {}", "sites": {"b": site(2), "a": site(1)}}
    return Federation(**(fields | changes))


def test_sites_are_sorted_and_prompts_follow_the_labels() -> None:
    federation = pets()
    assert list(federation.sites) == ["a", "b"]
    assert federation.prompts == ("a cat", "a dog")
    assert federation.shape == (3, 4, 4)
    assert list(federation.sites["a"].splits) == ["train", "validation", "test"]


def test_present_lists_the_classes_a_site_trains_on() -> None:
    half = Site(table([1, 1]), table([1]), table([0]))
    assert pets(sites={"a": site(), "b": half}).present == {"a": ("cat", "dog"), "b": ("dog",)}


def test_the_fingerprint_knows_every_byte_and_no_more() -> None:
    first = pets().fingerprint
    assert first == pets(name="other", notes=("copied",)).fingerprint
    assert len(first) == 64
    changed = site(2)
    changed.test["image"][0, 2, 3, 3] = 3
    others = [
        pets(sites={"a": site(1), "b": changed}),
        pets(sites={"a": site(1), "c": site(2)}),
        pets(classes=("dog", "cat")),
        pets(template="the {}"),
    ]
    assert len({first, *(other.fingerprint for other in others)}) == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": ("cat", "cat")}, "two or more different class names"),
        ({"template": "a pet"}, "expected a template with one {}"),
        ({"template": "a {} {}"}, "expected a template with one {}"),
        ({"template": "a {} of {class}"}, "expected a template with one {}"),
        ({"template": "a {place} of a {}"}, "expected a template with one {}"),
        ({"sites": {}}, "at least one site"),
        ({"sites": {"a": site(), "../b": site()}}, "site '../b': expected a name that is valid as a file name"),
        ({"sites": {"a": Site(table([0, 2]), table([1]), table([0]))}}, "expected labels 0 to 1, got 0 to 2"),
        ({"sites": {"a": Site(table([0, 1]), table([]), table([0]))}}, "site 'a', validation: no images"),
        ({"sites": {"a": site(), "b": site(side=8)}}, "images of one size"),
        ({"sites": {"a": Site({"image": torch.zeros(1, 3, 4, 4)}, table([1]), table([0]))}}, "columns image and label"),
        (
            {"sites": {"a": Site({"image": torch.zeros(1, 3, 4, 4), "label": torch.tensor([0])}, table([1]), table([0]))}},
            "expected uint8 images [n, 1 or 3, height, width], got float32 [1, 3, 4, 4]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError) as caught:
        pets(**changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_faults_come_at_once() -> None:
    with pytest.raises(InputError, match=r"expected a template.*site 'a', train: expected labels.*site 'b', test: no images"):
        pets(template="x", sites={"a": Site(table([5]), table([0]), table([0])), "b": Site(table([1]), table([0]), table([]))})


def test_a_stream_is_its_name() -> None:
    assert (random_state("a", 1).random_sample(3) * 1000).astype(int).tolist() == [71, 518, 295]
    assert (random_state("a", 2).random_sample(3) * 1000).astype(int).tolist() != [71, 518, 295]


@pytest.mark.parametrize("sites", [1, 3, 7])
def test_every_rule_deals_each_example_once(sites: int) -> None:
    for parts in (
        iid(LABELS, sites, key=(0,)),
        dirichlet(LABELS, sites, 0.5, key=(0,)),
        shards(LABELS, sites, 10, key=(0,)),
        quantity(LABELS, sites, 0.5, key=(0,)),
    ):
        assert len(parts) == sites
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(600))


def test_deals_repeat_by_key_and_differ_between_keys() -> None:
    first, again, other = (dirichlet(LABELS, 4, 0.5, key=(seed, "x")) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def counts(parts: list[np.ndarray]) -> np.ndarray:
    return np.stack([np.bincount(LABELS[part], minlength=10) for part in parts])


def test_iid_is_even_in_size_and_class() -> None:
    table = counts(iid(LABELS, 7, key=(0,)))
    assert np.ptp(table.sum(axis=1)) <= 1
    assert np.ptp(table, axis=0).max() <= 1


def test_alpha_is_the_strength_of_label_skew() -> None:
    spread = [counts(dirichlet(LABELS, 4, alpha, key=(0,))).std(axis=0).mean() for alpha in (0.2, 1.0, 100.0)]
    assert spread[0] > spread[1] > spread[2]
    assert spread[2] < 3


def test_dirichlet_leaves_no_site_bare() -> None:
    table = counts(dirichlet(LABELS, 6, 0.1, key=(0,), min_partition_size=30))
    assert table.sum(axis=1).min() >= 30
    assert (table > 0).sum(axis=1).min() >= 2


def test_shards_hold_exactly_so_many_classes() -> None:
    table = counts(shards(LABELS, 10, 2, key=(0,)))
    assert ((table > 0).sum(axis=1) == 2).all()
    assert ((table > 0).sum(axis=0) == 2).all()
    assert set(table[table > 0]) == {30}


def test_quantity_skews_sizes_only() -> None:
    table = counts(quantity(LABELS, 4, 0.5, key=(0,), min_partition_size=50))
    assert table.sum(axis=1).min() >= 50
    assert np.ptp(table.sum(axis=1)) > 60
    assert (table > 0).all()


def test_deals_that_cannot_be_say_so() -> None:
    with pytest.raises(InputError, match=r"expected alpha above 0, got 0"):
        dirichlet(LABELS, 4, 0, key=(0,))
    with pytest.raises(InputError, match="larger alpha or fewer sites"):
        dirichlet(LABELS, 10, 0.01, key=(0,), min_partition_size=55, tries=20)
    with pytest.raises(InputError, match="classes_per_site from 4 to 10"):
        shards(LABELS, 3, 2, key=(0,))
    with pytest.raises(InputError, match="1 to 600 sites"):
        iid(LABELS, 0, key=(0,))
    with pytest.raises(InputError, match="expected 700 examples or more, got 600"):
        quantity(LABELS, 7, 1, key=(0,), min_partition_size=100)


def pool() -> Federation:
    """Return one site; the pixels of an image encode its row and split."""
    image = torch.arange(120, dtype=torch.uint8)[:, None, None, None].expand(120, 3, 2, 2).contiguous()
    label = torch.arange(120) % 2
    rows = {"train": slice(0, 60), "validation": slice(60, 80), "test": slice(80, 120)}
    tables = {split: {"image": image[r], "label": label[r]} for split, r in rows.items()}
    return Federation("one", ("cat", "dog"), "a {}", {"here": Site(**tables)})


@pytest.mark.parametrize("rule", ["iid", "dirichlet", "shards", "quantity"])
def test_dealt_images_keep_their_split(rule: str) -> None:
    partitioned = partition(pool(), 2, rule, alpha=5.0)
    assert list(partitioned.sites) == ["site-0", "site-1"]
    for split, rows in pool().sites["here"].splits.items():
        found = torch.cat([site.splits[split]["image"][:, 0, 0, 0] for site in partitioned.sites.values()])
        assert sorted(found.tolist()) == rows["image"][:, 0, 0, 0].tolist()


def test_an_unknown_rule_has_a_neighbour() -> None:
    with pytest.raises(InputError, match="did you mean 'dirichlet'"):
        partition(pool(), 2, "dirichlett")
