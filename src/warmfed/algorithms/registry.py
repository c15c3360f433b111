"""Every algorithm by its name on the command line."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..utils.errors import InputError, suggest
from .apfl import APFL
from .baselines import Centralized, LocalOnly
from .dense import DENSE
from .ditto import Ditto
from .fedala import FedALA
from .fedamp import FedAMP
from .fedavg import FedAvg
from .fedbabu import FedBABU
from .fedbip import FedBiP
from .fedbn import FedBN
from .fedbsd import FedBSD
from .fedddpm import FedDDPM
from .feddeo import FedDEO
from .feddiffuse import FedDiffuse
from .feddm_quant import FedDMQuant
from .feddyn import FedDyn
from .fednova import FedNova
from .fedopt import FedOpt
from .fedper import FedPer
from .fedphd import FedPhD
from .fedproto import FedProto
from .fedprox import FedProx
from .fedrep import FedRep
from .fedrod import FedRoD
from .fgl import FGL
from .finetune import FedAvgFineTune
from .knnper import KNNPer
from .lgfedavg import LGFedAvg
from .moon import MOON
from .pdfed import PDFed
from .perfedavg import PerFedAvg
from .pfedme import PFedMe
from .pfedsd import PFedSD
from .scaffold import Scaffold
from .warmfed import WarmFed


@dataclass(frozen=True)
class Entry:
    """An algorithm as the command line offers it."""

    cls: type
    paper: str
    """Authors and year."""
    about: str
    """What it does."""
    shared: str
    """What a site sends."""
    private: str
    """What it keeps from one round to the next, beside its images; empty: nothing."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Configuration keys that belong to the name, under whatever the user sets."""
    tasks: tuple[str, ...] = ("classify",)
    """What it can learn."""


BOTH = ("classify", "denoise")
DRAWS = ("denoise",)
DENOISE = {"task": "denoise"}
CONVERGED = {"algorithm.budget.until": "validation"}
PUBLIC = {"model.start": "public"}
ADAM = {"algorithm.server.name": "adam", "algorithm.server.lr": 0.03}
YOGI = {"algorithm.server.name": "yogi", "algorithm.server.lr": 0.03}
SLOW = {**DENOISE, "algorithm.correct": "slow"}
ONLY = {**DENOISE, "algorithm.correct": "only"}
USPLIT, ULATDEC, UDEC = ({**DENOISE, "algorithm.exchange": word} for word in ("usplit", "ulatdec", "udec"))
TUN = {
    **DENOISE,
    "algorithm.local.optimizer": "adam",
    "algorithm.local.lr": 2e-4,
    "denoising.conditional": True,
    "denoising.dropout": 0.1,
    "denoising.prediction": "v_prediction",
    "denoising.schedule": "exponential",
    "denoising.weighting": "signal",
    "denoising.sampler": "ddpm",
    "denoising.steps": 300,
}

_ALONE = (LocalOnly, "reference")
_TOGETHER = (Centralized, "reference")
_FEDAVG = (FedAvg, "McMahan et al. 2017")
_FEDOPT = (FedOpt, "Reddi et al. 2021")
_FEDDDPM = (FedDDPM, "Peng et al. 2025")
_FEDDIFFUSE = (FedDiffuse, "de Goede et al. 2024")

ALGORITHMS: dict[str, Entry] = {
    "warmfed": Entry(
        WarmFed,
        "Feng et al. 2025",
        "adapters, warm start, gated server fine-tuning, dynamic self-distillation",
        "a diffusion adapter once, model",
        "two own models, their selector",
    ),
    "local": Entry(*_ALONE, "each site alone", "nothing", "model", tasks=BOTH),
    "local-converged": Entry(*_ALONE, "each site alone, to its best validation", "nothing", "model", CONVERGED),
    "centralized": Entry(*_TOGETHER, "all images in one place", "images", "", tasks=BOTH),
    "centralized-converged": Entry(*_TOGETHER, "all images in one place, to the best validation", "images", "", CONVERGED),
    "fedavg": Entry(*_FEDAVG, "weighted average of local models, from a random start", "model", "", tasks=BOTH),
    "fedavg-public": Entry(*_FEDAVG, "the same, from a classifier trained on the base's public data", "model", "", PUBLIC),
    "fedavg-finetune": Entry(
        FedAvgFineTune, "Wang et al. 2019", "FedAvg, then each site trains the last model for itself", "model", "tuned model"
    ),
    "fedprox": Entry(FedProx, "Li et al. 2020", "FedAvg with a proximal term", "model", "", tasks=BOTH),
    "fedavgm": Entry(FedOpt, "Hsu et al. 2019", "FedAvg with momentum at the server", "model", ""),
    "fedadam": Entry(*_FEDOPT, "FedAvg with Adam at the server", "model", "", ADAM),
    "fedyogi": Entry(*_FEDOPT, "FedAvg with Yogi at the server", "model", "", YOGI),
    "fednova": Entry(FedNova, "Wang et al. 2020", "FedAvg of changes per step", "mean gradient", ""),
    "scaffold": Entry(
        Scaffold,
        "Karimireddy et al. 2020",
        "local steps corrected by control variates",
        "changes of model, control",
        "control",
        tasks=BOTH,
    ),
    "feddyn": Entry(FedDyn, "Acar et al. 2021", "local losses regularised so that their minima agree", "model", "gradient"),
    "moon": Entry(MOON, "Li et al. 2021", "features drawn to the global model's, off the last", "model", "last model"),
    "fedper": Entry(FedPer, "Arivazhagan et al. 2019", "shared body, private head", "body", "head"),
    "fedrep": Entry(FedRep, "Collins et al. 2021", "shared body, private head that is fitted first", "body", "head"),
    "fedbabu": Entry(FedBABU, "Oh et al. 2022", "body under a fixed head, then each site tunes both", "body", "tuned model"),
    "lg-fedavg": Entry(LGFedAvg, "Liang et al. 2020", "private body, shared head", "head", "body"),
    "fedbn": Entry(FedBN, "Li et al. 2021", "private normalisation layers", "all other layers", "normalisation layers"),
    "fedrod": Entry(FedRoD, "Chen, Chao 2022", "a generic head and a personal one beside it", "model", "second head"),
    "ditto": Entry(Ditto, "Li et al. 2021", "a personal model held near the global one", "model", "personal model"),
    "pfedsd": Entry(PFedSD, "Jin et al. 2023", "taught by the site's own last model", "model", "last model"),
    "fedbsd": Entry(FedBSD, "Wang et al. 2023", "the global body teaches each site's own", "body", "own body, head"),
    "apfl": Entry(APFL, "Deng et al. 2020", "a mixture of the global model and a personal branch", "model", "personal branch"),
    "pfedme": Entry(PFedMe, "T. Dinh et al. 2020", "personal models by Moreau envelopes", "model", "personal model"),
    "perfedavg": Entry(
        PerFedAvg, "Fallah et al. 2020", "a start from which one step gives a good model", "model", "tuned model"
    ),
    "fedamp": Entry(FedAMP, "Huang et al. 2021", "a model for each site, mixed from those of similar sites", "model", "model"),
    "fedala": Entry(
        FedALA, "Zhang et al. 2023", "each site learns what it takes of the global model", "model", "model, its weights"
    ),
    "fedproto": Entry(FedProto, "Tan et al. 2022", "the classes' mean features, no weights", "mean features", "model"),
    "knnper": Entry(
        KNNPer, "Marfoq et al. 2022", "FedAvg, mixed with the nearest own images", "model", "features of its images"
    ),
    "dense": Entry(DENSE, "Zhang et al. 2022", "one-shot: sites' models distilled on images made up from them", "model", ""),
    "fgl": Entry(FGL, "Zhang et al. 2023", "warm start from prompts alone, no adapters", "class names once, model", ""),
    "feddeo": Entry(FedDEO, "Yang et al. 2024", "warm start from learned class descriptions", "descriptions once, model", ""),
    "fedbip": Entry(
        FedBiP, "Chen et al. 2025", "warm start from noised latents and concept vectors", "latents, concepts once, model", ""
    ),
    "fedddpm": Entry(
        *_FEDDDPM,
        "a diffusion model, corrected on samples of the sites' own",
        "a model of its own once, model",
        "",
        DENOISE,
        DRAWS,
    ),
    "fedddpm-plus": Entry(
        *_FEDDDPM, "the same, corrected only where learning is slow", "a model of its own once, model", "", SLOW, DRAWS
    ),
    "feddiffuse": Entry(*_FEDDIFFUSE, "FULL: a diffusion network both ways", "model", "", DENOISE, DRAWS),
    "feddiffuse-usplit": Entry(
        *_FEDDIFFUSE, "USPLIT: of two sites one returns the decoder, one the encoder", "half of the model", "", USPLIT, DRAWS
    ),
    "feddiffuse-ulatdec": Entry(*_FEDDIFFUSE, "ULATDEC: private encoders", "bottleneck, decoder", "encoder", ULATDEC, DRAWS),
    "feddiffuse-udec": Entry(
        *_FEDDIFFUSE, "UDEC: private encoders and bottlenecks", "decoder", "encoder, bottleneck", UDEC, DRAWS
    ),
    "feddm-quant": Entry(
        FedDMQuant, "Vora et al. 2024", "FedAvg of updates in eight bits or fewer", "change in few bits", "", DENOISE, DRAWS
    ),
    "fedphd": Entry(
        FedPhD,
        "Long et al. 2025",
        "edges whose sites together have all classes, and pruning",
        "counts of classes once, model",
        "",
        DENOISE,
        DRAWS,
    ),
    "pdfed": Entry(
        PDFed, "Balan et al. 2024", "sites go on from the peer's model that draws best", "model, vote", "model", DENOISE, DRAWS
    ),
    "fedavg-tun": Entry(
        FedAvg, "Tun et al. 2023", "FedAvg of a class-conditional network that predicts v", "model", "", TUN, DRAWS
    ),
    "auxiliary-only": Entry(
        *_FEDDDPM, "its control: the auxiliary set alone, no site trains", "a model of its own once", "", ONLY, DRAWS
    ),
}


def entry(name: str) -> Entry:
    """The algorithm of this name; raises `InputError` with the nearest known one."""
    if name not in ALGORITHMS:
        raise InputError(f"there is no algorithm {name!r}{suggest(name, list(ALGORITHMS))}")
    return ALGORITHMS[name]
