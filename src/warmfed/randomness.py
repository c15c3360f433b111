"""The only place where a seed is set. A random stream has a name, never an order of use.

Streams are named by (seed, stage, round, site, purpose): the number of workers, the order in which sites finish and
the transport cannot change what is drawn.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def number(*key: object) -> int:
    """A 63-bit number that depends on every part of `key` (SHA-256 of its representation)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def named(*key: object) -> torch.Generator:
    """The stream of this name, on the CPU: drawing on the CPU keeps results equal across devices."""
    return torch.Generator().manual_seed(number(*key))


def numpy_named(*key: object) -> np.random.Generator:
    """The same for code that needs NumPy (partitions, drawing of data)."""
    return np.random.default_rng(number(*key))


def child(parent: torch.Generator) -> torch.Generator:
    """A stream of its own, drawn from `parent`: two users of it cannot disturb each other."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=parent, device="cpu")))


def aside(parent: torch.Generator, purpose: str) -> torch.Generator:
    """A stream named by its purpose and by where `parent` stands, which stays there: what is extra disturbs nobody."""
    return named(hashlib.sha256(parent.get_state().numpy().tobytes()).hexdigest(), purpose)


@contextmanager
def seeded(parent: torch.Generator) -> Iterator[None]:
    """Inside, torch's global stream (dropout, module initialisation) is a child of `parent`; outside, it is as it was."""
    seed = int(torch.randint(2**62, (), generator=parent, device="cpu"))
    # torch.manual_seed would note a stack trace for every graphics card to come, which costs more than a small fit
    cards = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cards):
        torch.default_generator.manual_seed(seed)
        if cards:
            torch.cuda.manual_seed_all(seed)
        yield
