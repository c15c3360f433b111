"""FedDEO: a warm start from learned descriptions of the classes.

Yang et al., "FedDEO: Description-Enhanced One-Shot Federated Learning with Diffusion Models", ACM Multimedia 2024,
arXiv:2407.19953.

The full text was not available. This reading follows the abstract and the authors' server code. Each site learns a
description of each of its classes: a prompt embedding under which the frozen denoiser samples the site's images. The site
uploads the descriptions and nothing else. The server samples under them and trains a classifier on the samples.
`rounds` of FedAvg with fine-tuning on the samples follow, as in FGL; 0 is the paper's one-shot form.

Departures: AdamW on minibatches replaces SGD with learning rate 10 on single images. Guidance is towards the description
alone; the authors' sampler also guides towards the class's text. The samples are filtered as in WarmFed.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from ..core import GeneratorSpec
from ..core.training import Training
from .shared.synthetic_data import AdapterUpload, WarmStarted, demand_held_classes


@final
@dataclass(frozen=True)
class FedDEO(WarmStarted[AdapterUpload]):
    """Train a classifier on samples of learned class descriptions, then run FedAvg; sites send no adapter weights."""

    images: ClassVar[bool] = False

    description: Training = Training(optimizer="adamw", lr=3e-2, epochs=12, schedule="cosine", warmup=5, max_grad_norm=1.0)
    """Training of a site's class descriptions."""

    def __post_init__(self) -> None:
        demand_held_classes(self.synthesis, "FedDEO")

    @property
    def needs_generator(self) -> GeneratorSpec:
        return GeneratorSpec("prompts", self.description)
