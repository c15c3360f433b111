"""An algorithm's entry in the registry."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """An algorithm's entry in the registry: its class, its preset and what `warmfed algorithms` shows."""

    cls: type
    """The class that implements the algorithm."""
    _: KW_ONLY
    page: str
    """Stem of its page under docs/algorithms."""
    paper: str
    """Authors and year of the paper; "reference" for a baseline without one."""
    about: str
    """What the algorithm does, in one line."""
    shared: str
    """What a site sends to the server."""
    private: str
    """What a site keeps between rounds, besides its images; empty if it keeps nothing."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Configuration keys that the name presets; the user's own values take precedence."""
    tasks: tuple[str, ...] = ("classify",)
    """Tasks that the algorithm supports: classify, denoise or both."""
