"""Registry entries of the methods that train a diffusion model together."""

from collections.abc import Mapping

from .fedavg import FedAvg
from .fedddpm import FedDDPM
from .feddiffuse import FedDiffuse
from .feddm_quant import FedDMQuant
from .fedphd import FedPhD
from .pdfed import PDFed
from .presets import DENOISE, DRAWS, ONLY, SLOW, TUN, UDEC, ULATDEC, USPLIT
from .shared.entry import Entry

GENERATIVE: Mapping[str, Entry] = {
    "fedddpm": Entry(
        FedDDPM,
        page="fedddpm",
        paper="Peng et al. 2025",
        about="a diffusion model, corrected each round on samples of the sites' own models",
        shared="a model of its own once, model",
        private="",
        settings=DENOISE,
        tasks=DRAWS,
    ),
    "fedddpm-plus": Entry(
        FedDDPM,
        page="fedddpm",
        paper="Peng et al. 2025",
        about="FedDDPM, corrected only if learning is slow",
        shared="a model of its own once, model",
        private="",
        settings=SLOW,
        tasks=DRAWS,
    ),
    "feddiffuse": Entry(
        FedDiffuse,
        page="feddiffuse",
        paper="de Goede et al. 2024",
        about="FULL: the whole diffusion network both ways",
        shared="model",
        private="",
        settings=DENOISE,
        tasks=DRAWS,
    ),
    "feddiffuse-usplit": Entry(
        FedDiffuse,
        page="feddiffuse",
        paper="de Goede et al. 2024",
        about="USPLIT: in each pair, one site returns the decoder, the other the encoder",
        shared="half of the model",
        private="",
        settings=USPLIT,
        tasks=DRAWS,
    ),
    "feddiffuse-ulatdec": Entry(
        FedDiffuse,
        page="feddiffuse",
        paper="de Goede et al. 2024",
        about="ULATDEC: private encoders",
        shared="bottleneck, decoder",
        private="encoder",
        settings=ULATDEC,
        tasks=DRAWS,
    ),
    "feddiffuse-udec": Entry(
        FedDiffuse,
        page="feddiffuse",
        paper="de Goede et al. 2024",
        about="UDEC: private encoders and bottlenecks",
        shared="decoder",
        private="encoder, bottleneck",
        settings=UDEC,
        tasks=DRAWS,
    ),
    "feddm-quant": Entry(
        FedDMQuant,
        page="feddm-quant",
        paper="Vora et al. 2024",
        about="FedAvg of updates quantized to eight bits or fewer",
        shared="quantized update",
        private="",
        settings=DENOISE,
        tasks=DRAWS,
    ),
    "fedphd": Entry(
        FedPhD,
        page="fedphd",
        paper="Long et al. 2025",
        about="hierarchical averaging by class balance, and pruning",
        shared="class counts once, model",
        private="",
        settings=DENOISE,
        tasks=DRAWS,
    ),
    "pdfed": Entry(
        PDFed,
        page="pdfed",
        paper="Balan et al. 2024",
        about="each site continues from the peer's model with the best samples",
        shared="model, vote",
        private="model",
        settings=DENOISE,
        tasks=DRAWS,
    ),
    "fedavg-tun": Entry(
        FedAvg,
        page="fedavg-tun",
        paper="Tun et al. 2023",
        about="FedAvg of a class-conditional network with v-prediction",
        shared="model",
        private="",
        settings=TUN,
        tasks=DRAWS,
    ),
    "auxiliary-only": Entry(
        FedDDPM,
        page="fedddpm",
        paper="Peng et al. 2025",
        about="control of FedDDPM: training on the auxiliary set alone",
        shared="a model of its own once",
        private="",
        settings=ONLY,
        tasks=DRAWS,
    ),
}
