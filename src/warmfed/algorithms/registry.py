"""The registry of algorithms: one entry for each name on the command line; those of diffusion models are in a second file."""

from ..utils.errors import InputError, suggest
from .apfl import APFL
from .baselines import Centralized, LocalOnly
from .ccvr import CCVR
from .dense import DENSE
from .ditto import Ditto
from .fedala import FedALA
from .fedamp import FedAMP
from .fedavg import FedAvg
from .fedavg_finetune import FedAvgFineTune
from .fedbabu import FedBABU
from .fedbip import FedBiP
from .fedbn import FedBN
from .fedbsd import FedBSD
from .feddeo import FedDEO
from .feddf import FedDF
from .feddyn import FedDyn
from .fedncm import FedNCM
from .fednova import FedNova
from .fedopt import FedOpt
from .fedper import FedPer
from .fedpft import FedPFT
from .fedproto import FedProto
from .fedprox import FedProx
from .fedrep import FedRep
from .fedrod import FedRoD
from .fgl import FGL
from .generative_registry import GENERATIVE
from .knnper import KNNPer
from .lg_fedavg import LGFedAvg
from .moon import MOON
from .perfedavg import PerFedAvg
from .pfedme import PFedMe
from .pfedsd import PFedSD
from .presets import ADAM, AUTO, BOTH, CONVERGED, PAPER, PUBLIC, YOGI
from .scaffold import Scaffold
from .shared.entry import Entry
from .warmfed import WarmFed

ALGORITHMS: dict[str, Entry] = {
    "warmfed": Entry(
        WarmFed,
        page="warmfed",
        paper="Feng et al. 2025",
        about="adapters, warm start on samples of all classes, gated server fine-tuning, personal models with replay",
        shared="a diffusion adapter once, model",
        private="two own models, samples of classes that it lacks",
        settings=AUTO,
    ),
    "warmfed-paper": Entry(
        WarmFed,
        page="warmfed",
        paper="Feng et al. 2025",
        about="WarmFed as in its paper: no filter, no gates, random start, dynamic self-distillation",
        shared="a diffusion adapter once, model",
        private="two own models, their selector",
        settings=PAPER,
    ),
    "local": Entry(
        LocalOnly,
        page="baselines",
        paper="reference",
        about="each site trains alone",
        shared="nothing",
        private="model",
        tasks=BOTH,
    ),
    "local-converged": Entry(
        LocalOnly,
        page="baselines",
        paper="reference",
        about="each site trains alone, until its validation accuracy stops rising",
        shared="nothing",
        private="model",
        settings=CONVERGED,
    ),
    "centralized": Entry(
        Centralized,
        page="baselines",
        paper="reference",
        about="one model trained on all sites' images",
        shared="images",
        private="",
        tasks=BOTH,
    ),
    "centralized-converged": Entry(
        Centralized,
        page="baselines",
        paper="reference",
        about="one model trained on all sites' images, until validation accuracy stops rising",
        shared="images",
        private="",
        settings=CONVERGED,
    ),
    "fedavg": Entry(
        FedAvg,
        page="fedavg",
        paper="McMahan et al. 2017",
        about="weighted average of local models, from a random start",
        shared="model",
        private="",
        tasks=BOTH,
    ),
    "fedavg-public": Entry(
        FedAvg,
        page="fedavg",
        paper="McMahan et al. 2017",
        about="FedAvg from a classifier trained on the base's public data",
        shared="model",
        private="",
        settings=PUBLIC,
    ),
    "fedavg-finetune": Entry(
        FedAvgFineTune,
        page="fedavg-finetune",
        paper="Wang et al. 2019",
        about="FedAvg, then each site fine-tunes the last global model",
        shared="model",
        private="tuned model",
    ),
    "fedprox": Entry(
        FedProx,
        page="fedprox",
        paper="Li et al. 2020",
        about="FedAvg with a proximal term",
        shared="model",
        private="",
        tasks=BOTH,
    ),
    "fedavgm": Entry(
        FedOpt,
        page="fedopt",
        paper="Hsu et al. 2019",
        about="FedAvg with momentum at the server",
        shared="model",
        private="",
    ),
    "fedadam": Entry(
        FedOpt,
        page="fedopt",
        paper="Reddi et al. 2021",
        about="FedAvg with Adam at the server",
        shared="model",
        private="",
        settings=ADAM,
    ),
    "fedyogi": Entry(
        FedOpt,
        page="fedopt",
        paper="Reddi et al. 2021",
        about="FedAvg with Yogi at the server",
        shared="model",
        private="",
        settings=YOGI,
    ),
    "fednova": Entry(
        FedNova,
        page="fednova",
        paper="Wang et al. 2020",
        about="FedAvg of updates normalised by local steps",
        shared="normalised update",
        private="",
    ),
    "scaffold": Entry(
        Scaffold,
        page="scaffold",
        paper="Karimireddy et al. 2020",
        about="local steps corrected by control variates",
        shared="updates of model and control variate",
        private="control variate",
        tasks=BOTH,
    ),
    "feddyn": Entry(
        FedDyn,
        page="feddyn",
        paper="Acar et al. 2021",
        about="local losses with a dynamic regulariser",
        shared="model",
        private="gradient",
    ),
    "ccvr": Entry(
        CCVR,
        page="ccvr",
        paper="Luo et al. 2021",
        about="FedAvg, then a head calibrated on features sampled from class Gaussians",
        shared="model, mean and covariance of the features of each class once",
        private="",
    ),
    "fedpft": Entry(
        FedPFT,
        page="fedpft",
        paper="Beitollahi et al. 2024",
        about="one shot: a head trained on features sampled from the sites' Gaussian mixtures",
        shared="Gaussian mixtures of the features of each class once",
        private="",
    ),
    "fedncm": Entry(
        FedNCM,
        page="fedncm",
        paper="Legate et al. 2023",
        about="class means of the features as the head, then FedAvg",
        shared="mean features of each class once, model",
        private="",
    ),
    "moon": Entry(
        MOON,
        page="moon",
        paper="Li et al. 2021",
        about="contrastive loss: near the global model, far from the last local one",
        shared="model",
        private="last model",
    ),
    "fedper": Entry(
        FedPer,
        page="fedper",
        paper="Arivazhagan et al. 2019",
        about="shared body, private head",
        shared="body",
        private="head",
    ),
    "fedrep": Entry(
        FedRep,
        page="fedrep",
        paper="Collins et al. 2021",
        about="shared body, private head; the head is trained first",
        shared="body",
        private="head",
    ),
    "fedbabu": Entry(
        FedBABU,
        page="fedbabu",
        paper="Oh et al. 2022",
        about="shared body under a fixed head, then each site fine-tunes both",
        shared="body",
        private="tuned model",
    ),
    "lg-fedavg": Entry(
        LGFedAvg,
        page="lg-fedavg",
        paper="Liang et al. 2020",
        about="private body, shared head",
        shared="head",
        private="body",
    ),
    "fedbn": Entry(
        FedBN,
        page="fedbn",
        paper="Li et al. 2021",
        about="private normalisation layers",
        shared="all other layers",
        private="normalisation layers",
    ),
    "fedrod": Entry(
        FedRoD,
        page="fedrod",
        paper="Chen, Chao 2022",
        about="a generic head and a personal head",
        shared="model",
        private="personal head",
    ),
    "ditto": Entry(
        Ditto,
        page="ditto",
        paper="Li et al. 2021",
        about="a personal model with a proximal term towards the global one",
        shared="model",
        private="personal model",
    ),
    "pfedsd": Entry(
        PFedSD,
        page="pfedsd",
        paper="Jin et al. 2023",
        about="self-distillation from the site's last model",
        shared="model",
        private="last model",
    ),
    "fedbsd": Entry(
        FedBSD,
        page="fedbsd",
        paper="Wang et al. 2023",
        about="distillation from the global backbone into each site's own",
        shared="body",
        private="own body, head",
    ),
    "apfl": Entry(
        APFL,
        page="apfl",
        paper="Deng et al. 2020",
        about="a mixture of the global model and a personal branch",
        shared="model",
        private="personal branch",
    ),
    "pfedme": Entry(
        PFedMe,
        page="pfedme",
        paper="T. Dinh et al. 2020",
        about="personal models by Moreau envelopes",
        shared="model",
        private="personal model",
    ),
    "perfedavg": Entry(
        PerFedAvg,
        page="perfedavg",
        paper="Fallah et al. 2020",
        about="meta-learning: an initial model that one local step adapts",
        shared="model",
        private="tuned model",
    ),
    "fedamp": Entry(
        FedAMP,
        page="fedamp",
        paper="Huang et al. 2021",
        about="one mixture of models per site, weighted by similarity",
        shared="model",
        private="model",
    ),
    "fedala": Entry(
        FedALA,
        page="fedala",
        paper="Zhang et al. 2023",
        about="each site learns weights that mix the global model into its own",
        shared="model",
        private="model, mixing weights",
    ),
    "fedproto": Entry(
        FedProto,
        page="fedproto",
        paper="Tan et al. 2022",
        about="exchange of class prototypes (mean features) instead of weights",
        shared="class prototypes",
        private="model",
    ),
    "knnper": Entry(
        KNNPer,
        page="knnper",
        paper="Marfoq et al. 2022",
        about="FedAvg, mixed with a k-nearest-neighbour classifier at each site",
        shared="model",
        private="features of its images",
    ),
    "feddf": Entry(
        FedDF,
        page="feddf",
        paper="Lin et al. 2020",
        about="FedAvg, distilled each round from the ensemble on generated images",
        shared="model",
        private="",
    ),
    "dense": Entry(
        DENSE,
        page="dense",
        paper="Zhang et al. 2022",
        about="one-shot, data-free distillation of the sites' models",
        shared="model",
        private="",
    ),
    "fgl": Entry(
        FGL,
        page="fgl",
        paper="Zhang et al. 2023",
        about="warm start from prompts alone, no adapters",
        shared="class names once, model",
        private="",
    ),
    "feddeo": Entry(
        FedDEO,
        page="feddeo",
        paper="Yang et al. 2024",
        about="warm start from learned class descriptions",
        shared="descriptions once, model",
        private="",
    ),
    "fedbip": Entry(
        FedBiP,
        page="fedbip",
        paper="Chen et al. 2025",
        about="warm start from noised latents and concept vectors",
        shared="latents, concepts once, model",
        private="",
    ),
    **GENERATIVE,
}


def entry(name: str) -> Entry:
    """Return the registry entry of an algorithm.

    Raises:
        InputError: the name is unknown; the message suggests the nearest known name.
    """
    if name not in ALGORITHMS:
        raise InputError(f"there is no algorithm {name!r}{suggest(name, list(ALGORITHMS))}")
    return ALGORITHMS[name]
