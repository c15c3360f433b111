"""Every algorithm by its name on the command line."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError, suggest
from .apfl import APFL
from .dense import DENSE
from .ditto import Ditto
from .fedala import FedALA
from .fedamp import FedAMP
from .fedavg import FedAvg
from .fedbip import FedBiP
from .fedddpm import FedDDPM
from .feddeo import FedDEO
from .fedper import FedPer
from .fedproto import FedProto
from .fedprox import FedProx
from .fgl import FGL
from .finetune import FedAvgFineTune
from .knnper import KNNPer
from .perfedavg import PerFedAvg
from .pfedme import PFedMe
from .pfedsd import PFedSD
from .references import Centralized, LocalOnly
from .warmfed import WarmFed


@dataclass(frozen=True)
class Entry:
    """An algorithm as the command line offers it."""

    cls: type
    paper: str
    about: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Configuration keys that belong to the name, under whatever the user sets."""
    tasks: tuple[str, ...] = ("classify",)
    """What it can learn."""


BOTH = ("classify", "denoise")
DENOISE = {"task": "denoise"}

ALGORITHMS: dict[str, Entry] = {
    "warmfed": Entry(WarmFed, "Feng et al. 2025", "adapters, warm start, gated server fine-tuning, dynamic self-distillation"),
    "local": Entry(LocalOnly, "reference", "each site alone", tasks=BOTH),
    "local-converged": Entry(
        LocalOnly, "reference", "each site alone, to its best validation", {"algorithm.budget.until": "validation"}
    ),
    "centralized": Entry(Centralized, "reference", "all images in one place", tasks=BOTH),
    "centralized-converged": Entry(
        Centralized, "reference", "all images in one place, to the best validation", {"algorithm.budget.until": "validation"}
    ),
    "fedavg": Entry(FedAvg, "McMahan et al. 2017", "weighted average of local models, from a random start", tasks=BOTH),
    "fedavg-public": Entry(
        FedAvg,
        "McMahan et al. 2017",
        "the same, from a classifier trained on the base's public data",
        {"model.start": "public"},
    ),
    "fedavg-finetune": Entry(FedAvgFineTune, "Wang et al. 2019", "FedAvg, then each site trains the last model for itself"),
    "fedprox": Entry(FedProx, "Li et al. 2020", "FedAvg with a proximal term", tasks=BOTH),
    "fedper": Entry(FedPer, "Arivazhagan et al. 2019", "shared body, private head"),
    "ditto": Entry(Ditto, "Li et al. 2021", "a personal model held near the global one"),
    "pfedsd": Entry(PFedSD, "Jin et al. 2023", "taught by the site's own last model"),
    "apfl": Entry(APFL, "Deng et al. 2020", "a learned mixture of the global model and a personal branch"),
    "pfedme": Entry(PFedMe, "T. Dinh et al. 2020", "personal models by Moreau envelopes around the global one"),
    "perfedavg": Entry(PerFedAvg, "Fallah et al. 2020", "a start from which one step of a site's own gives a good model"),
    "fedamp": Entry(FedAMP, "Huang et al. 2021", "a model for each site, mixed at the server from those of similar sites"),
    "fedala": Entry(FedALA, "Zhang et al. 2023", "each site learns how much of the global model's last layers it takes"),
    "fedproto": Entry(FedProto, "Tan et al. 2022", "the classes' mean features are exchanged, and no weights"),
    "knnper": Entry(KNNPer, "Marfoq et al. 2022", "FedAvg, mixed with the nearest of a site's own images"),
    "dense": Entry(DENSE, "Zhang et al. 2022", "one-shot: the sites' models distilled on images made up from them"),
    "fgl": Entry(FGL, "Zhang et al. 2023", "warm start from prompts alone, no adapters"),
    "feddeo": Entry(FedDEO, "Yang et al. 2024", "warm start from learned class descriptions, no weights"),
    "fedbip": Entry(FedBiP, "Chen et al. 2025", "warm start from noised latents and concept vectors"),
    "fedddpm": Entry(
        FedDDPM, "Peng et al. 2025", "a diffusion model, corrected on samples of the sites' own models", DENOISE, ("denoise",)
    ),
    "fedddpm-plus": Entry(
        FedDDPM,
        "Peng et al. 2025",
        "the same, corrected only where learning is slow",
        {**DENOISE, "algorithm.correct": "slow"},
        ("denoise",),
    ),
}


def entry(name: str) -> Entry:
    """The algorithm of this name; raises `InputError` with the nearest known one."""
    if name not in ALGORITHMS:
        raise InputError(f"there is no algorithm {name!r}{suggest(name, list(ALGORITHMS))}")
    return ALGORITHMS[name]
