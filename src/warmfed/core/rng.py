"""Named random streams. No other module sets a seed.

A stream is named by (seed, stage, round, site, purpose). So its numbers do not depend on the number of workers, on the
transport, or on the order in which sites finish.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""Fixes the order of additions in cuBLAS, which reads the variable once, before its first product."""


def stream_seed(*key: object) -> int:
    """Return a 63-bit seed that depends on every part of `key` (SHA-256 of its representation)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def stream(*key: object) -> torch.Generator:
    """Return the random stream of this name. It is on the CPU, so that its numbers are equal for all devices."""
    return torch.Generator().manual_seed(stream_seed(*key))


def numpy_stream(*key: object) -> np.random.Generator:
    """Return the NumPy generator of this name."""
    return np.random.default_rng(stream_seed(*key))


def random_state(*key: object) -> np.random.RandomState:
    """Return NumPy's legacy generator of this name, for partitions of data.

    NumPy guarantees that the stream of `RandomState` never changes; the stream of `Generator` may change.
    """
    name = stream_seed(*key)
    return np.random.RandomState([name >> 32, name & 0xFFFFFFFF])


def spawn(parent: torch.Generator) -> torch.Generator:
    """Return a new stream seeded by a draw from `parent`; `parent` advances."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=parent, device="cpu")))


def fork(parent: torch.Generator, purpose: str) -> torch.Generator:
    """Return a new stream named by its purpose and the state of `parent`; `parent` does not advance."""
    return stream(hashlib.sha256(parent.get_state().numpy().tobytes()).hexdigest(), purpose)


@contextmanager
def seeded(parent: torch.Generator, device: str | torch.device = "cpu") -> Iterator[None]:
    """Seed torch's global stream (dropout, module initialisation) from `parent` within this context.

    The global stream is restored at the end. On a GPU, only deterministic kernels run within the context.
    """
    seed = int(torch.randint(2**62, (), generator=parent, device="cpu"))
    # torch.manual_seed records a stack trace for every GPU that is not initialised yet, which costs more than a small fit
    there = torch.device(device).type == "cuda"
    cards = list(range(torch.cuda.device_count())) if there or torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cards), _repeatable() if there else nullcontext():
        torch.default_generator.manual_seed(seed)
        if cards:
            torch.cuda.manual_seed_all(seed)
        yield


@contextmanager
def _repeatable() -> Iterator[None]:
    """Restrict torch to deterministic kernels within this context; restore its setting at the end."""
    filling: Any = torch.utils.deterministic  # fills new tensors, which only helps programs that read uninitialised memory
    before, fill = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        filling.fill_uninitialized_memory = fill
