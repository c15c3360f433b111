"""FedDEO, description-enhanced one-shot federated learning. Yang et al., ACM Multimedia 2024, arXiv:2407.19953.

Each site learns a description of each of its classes, a prompt embedding under which the frozen denoiser draws the site's
images, and uploads nothing else; the server samples by the descriptions and trains a classifier on the samples.
The paper's text was not at hand: this is a reading of its abstract and of the authors' code for the server.
Departures: AdamW and minibatches in place of SGD with learning rate 10 on single images; guidance towards the description
alone (the authors' sampler adds that towards the class's text, at which a description begins); the samples are filtered as
WarmFed's are. `rounds` of FedAvg with fine-tuning on the samples follow, as FGL's do; 0 is the paper's one-shot form.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from ..core import GeneratorSpec
from ..fit import Training
from .shared.synthetic_data import AdapterUpload, WarmStarted


@final
@dataclass(frozen=True)
class FedDEO(WarmStarted[AdapterUpload]):
    """Warm start from the sites' learned class descriptions, without any weights."""

    images: ClassVar[bool] = False

    description: Training = Training(optimizer="adamw", lr=3e-2, epochs=12, schedule="cosine", warmup=5, max_grad_norm=1.0)
    """A site's training of its descriptions."""

    @property
    def needs_generator(self) -> GeneratorSpec:
        return GeneratorSpec("prompts", self.description)
