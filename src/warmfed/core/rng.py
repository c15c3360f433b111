"""The only place where a seed is set. A random stream has a name, never an order of use.

Streams are named by (seed, stage, round, site, purpose): the number of workers, the order in which sites finish and
the transport cannot change what is drawn.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""Without it cuBLAS adds in another order from run to run; it looks once, before its first product."""


def stream_seed(*key: object) -> int:
    """A 63-bit number that depends on every part of `key` (SHA-256 of its representation)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def stream(*key: object) -> torch.Generator:
    """The stream of this name, on the CPU: drawing on the CPU keeps results equal across devices."""
    return torch.Generator().manual_seed(stream_seed(*key))


def numpy_stream(*key: object) -> np.random.Generator:
    """The same for code that needs NumPy (partitions, drawing of data)."""
    return np.random.default_rng(stream_seed(*key))


def random_state(*key: object) -> np.random.RandomState:
    """The same as one of NumPy's old streams, which shares of data are drawn from.

    RandomState because its stream is frozen for good; NumPy keeps the right to change that of `Generator`.
    """
    name = stream_seed(*key)
    return np.random.RandomState([name >> 32, name & 0xFFFFFFFF])


def spawn(parent: torch.Generator) -> torch.Generator:
    """A stream of its own, drawn from `parent`: two users of it cannot disturb each other."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=parent, device="cpu")))


def fork(parent: torch.Generator, purpose: str) -> torch.Generator:
    """A stream named by its purpose and by where `parent` stands, which stays there: what is extra disturbs nobody."""
    return stream(hashlib.sha256(parent.get_state().numpy().tobytes()).hexdigest(), purpose)


@contextmanager
def seeded(parent: torch.Generator, device: str | torch.device = "cpu") -> Iterator[None]:
    """Inside, torch's global stream (dropout, module initialisation) is a child of `parent`; outside, it is as it was.

    On a graphics card the kernels inside are those that give the same bytes each time.
    """
    seed = int(torch.randint(2**62, (), generator=parent, device="cpu"))
    # torch.manual_seed would note a stack trace for every graphics card to come, which costs more than a small fit
    there = torch.device(device).type == "cuda"
    cards = list(range(torch.cuda.device_count())) if there or torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cards), _repeatable() if there else nullcontext():
        torch.default_generator.manual_seed(seed)
        if cards:
            torch.cuda.manual_seed_all(seed)
        yield


@contextmanager
def _repeatable() -> Iterator[None]:
    """Inside, torch takes deterministic kernels only; outside, what it took before."""
    filling: Any = torch.utils.deterministic  # of new tensors: time, for programs that read what they never wrote
    before, fill = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        filling.fill_uninitialized_memory = fill
