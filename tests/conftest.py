"""What every test may rely on: one thread, and toy data made once."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WARMFED_CACHE"] = tempfile.mkdtemp(prefix="warmfed-cache-")

import pytest
import torch
import toy

from warmfed.core.tensors import Table

torch.set_num_threads(1)
atexit.register(shutil.rmtree, os.environ["WARMFED_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def sites() -> Mapping[str, Mapping[str, Table]]:
    return toy.SITES
