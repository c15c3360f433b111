"""FedBiP: a warm start from noised latents and concept vectors.

Chen et al., "FedBiP: Heterogeneous One-Shot Federated Learning with Personalized Latent Diffusion Models", CVPR 2025,
arXiv:2410.04810.

The full text was not available. This reading follows the abstract and the authors' code for training and sampling.
Instance level: a site sends latents from which sampling starts. Each is a mixture of two images of a class (γ ~ N(0.5, 0.1²)).
Noise leaves 0.47 % of the variance as signal, as at the last step of Stable Diffusion. Concept level: a site learns one vector
for its domain and one for each class. The server perturbs the domain vector by N(0, 0.1²).
`rounds` of FedAvg with fine-tuning on the samples follow, as in FGL; 0 is the one-shot form.

Departures: the vectors are added to every token of the class's prompt; the paper puts them in the places of two words of "a S
style of a V". Sampling starts at the noise level of the latents. There is one latent for each training image. The samples are
filtered as in WarmFed.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from ..core import GeneratorSpec
from ..core.training import Training
from ..utils.errors import InputError
from .shared.synthetic_data import AdapterUpload, WarmStarted, demand_held_classes


@final
@dataclass(frozen=True)
class FedBiP(WarmStarted[AdapterUpload]):
    """Train a classifier on samples of noised latents and concept vectors, then run FedAvg; latents reveal image content."""

    images: ClassVar[bool] = True  # latents are encoded, noised images of the site

    concepts: Training = Training(optimizer="adam", lr=3e-2, epochs=12, schedule="cosine", warmup=5, max_grad_norm=1.0)
    """Training of a site's domain and class vectors (the paper: Adam with 0.1, 50 epochs of 16 images a class)."""
    signal: float = 0.0047
    """Share ᾱ of an uploaded latent's variance that is image, from 0 to below 1; near 1, latents are nearly the images."""
    variation: float = 0.1
    """Standard deviation of the noise that the server adds to the domain vector for each sample; at least 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.signal < 1 or self.variation < 0:
            raise InputError("signal must be at least 0 and below 1, variation at least 0; check [algorithm]")
        demand_held_classes(self.synthesis, "FedBiP")

    @property
    def needs_generator(self) -> GeneratorSpec:
        return GeneratorSpec("concepts", self.concepts, self.signal, self.variation)
