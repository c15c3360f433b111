"""The embedded federation: its bytes, its splits and its styles."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from warmfed.data import digits4
from warmfed.data.federation import Federation
from warmfed.data.partition import dirichlet, iid
from warmfed.data.readers.digits4 import SIZE
from warmfed.utils.errors import InputError

FINGERPRINT = "89aaf5f0e091d6d6f9c13b19da7bfc82f939cf0a050fb262a1687173e0f9e1e6"


@pytest.fixture(scope="module")
def federation() -> Federation:
    return digits4()


def test_the_bytes_are_the_same_everywhere(federation: Federation) -> None:
    """If this fails on one machine only, its Pillow decodes JPEG differently; log a change of a style."""
    assert federation.fingerprint == FINGERPRINT


def test_size_of_sites_and_splits(federation: Federation) -> None:
    sizes = {name: tuple(len(t["label"]) for t in site.splits.values()) for name, site in federation.sites.items()}
    assert sizes == {"ink": (225, 45, 180), "paper": (225, 45, 179), "street": (225, 45, 179), "texture": (225, 45, 179)}
    assert federation.shape == (3, SIZE, SIZE)
    assert federation.prompts[3] == "a photo of the digit three"


def test_splits_are_stratified(federation: Federation) -> None:
    for site in federation.sites.values():
        for table, (low, high) in zip(site.splits.values(), ((21, 23), (4, 5), (17, 18)), strict=True):
            counts = table["label"].bincount(minlength=10)
            assert low <= int(counts.min()) <= int(counts.max()) <= high


def test_no_original_is_its_own_twin_and_each_lies_on_one_site_in_one_split() -> None:
    digits = load_digits()
    assert len(np.unique(digits.data, axis=0)) == 1797
    for parts in (iid(digits.target, 4, key=("digits4", 0)), dirichlet(digits.target, 4, 0.3, key=("digits4", 0))):
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1797))


def test_labels_belong_to_the_images(federation: Federation) -> None:
    """`ink` shows the original itself: shrunk to 8x8, each image is nearest to an original of its label."""
    digits = load_digits()
    train = federation.sites["ink"].train
    small = torch.nn.functional.avg_pool2d(train["image"][:, 0].float(), 4).flatten(1)
    distance = torch.cdist(small, torch.from_numpy(digits.data * 16).float())
    found = torch.from_numpy(digits.target)[distance.argmin(1)]
    assert (found == train["label"]).float().mean() > 0.97


def test_looks(federation: Federation) -> None:
    ink, paper, street, texture = (site.train["image"].float() for site in federation.sites.values())
    border = [look[:, :, [0, -1]].mean().item() for look in (ink, paper)]
    assert border[0] < 15
    assert border[1] > 195
    saturation = [(look.amax(1) - look.amin(1)).mean().item() for look in (ink, paper, street, texture)]
    assert saturation[0] == 0
    assert 2 < saturation[1] < 30 < saturation[3] < saturation[2]  # grey, tinted, coloured


def test_another_seed_and_label_skew_on_top(federation: Federation) -> None:
    skewed = digits4(seed=1, alpha=0.3)
    assert skewed.name == "digits4(seed=1, alpha=0.3)"
    assert skewed.fingerprint != federation.fingerprint
    counts = torch.stack([site.train["label"].bincount(minlength=10) for site in skewed.sites.values()]).float()
    assert counts.std(0).mean() > 15
    assert sum(len(t["label"]) for site in skewed.sites.values() for t in site.splits.values()) == 1797


def test_alpha_must_be_above_zero() -> None:
    with pytest.raises(InputError, match="alpha above 0"):
        digits4(alpha=-1.0)
