"""Shared fixtures: one thread, and toy data made once."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WARMFED_CACHE"] = tempfile.mkdtemp(prefix="warmfed-cache-")

import hypothesis
import pytest
import torch
import toy

from warmfed.core.tensors import Table

torch.set_num_threads(1)
# the same examples in every run; `pytest --hypothesis-profile=default` draws new ones
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")
atexit.register(shutil.rmtree, os.environ["WARMFED_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def sites() -> Mapping[str, Mapping[str, Table]]:
    return toy.SITES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a module on one worker if they share an expensive fixture or a cached run."""
    for item in items:
        found = getattr(item, "_fixtureinfo", None)
        scopes = {each.scope for fixtures in found.name2fixturedefs.values() for each in fixtures} if found else set()
        if "module" in scopes:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
