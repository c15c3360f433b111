"""FedBiP, bi-level personalisation of a latent diffusion model. Chen et al., CVPR 2025, arXiv:2410.04810.

Instance level: a site sends latents from which sampling begins, mixtures of two images of a class (γ ~ N(0.5, 0.1²)) under so
much noise that 0.47 % of them is signal, as at the last step of Stable Diffusion. Concept level: it learns a vector for its
domain and one for each class, and nothing else of the model. The server varies the domain's by N(0, 0.1²).
The paper's text was not at hand: this is a reading of its abstract and of the authors' code for training and sampling.
Departures: the vectors are added to every token of the class's prompt (the paper puts them in the places of two words of "a S
style of a V"); sampling begins where the base's own noise is as strong as the latents'; one latent for each training image; the
samples are filtered as WarmFed's are; `rounds` of FedAvg with fine-tuning on the samples follow, as FGL's do; 0 is one-shot.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from ..core import GeneratorSpec
from ..fit import Training
from ..utils.errors import InputError
from .shared.synthetic_data import AdapterUpload, WarmStarted


@final
@dataclass(frozen=True)
class FedBiP(WarmStarted[AdapterUpload]):
    """Warm start from noised latents and concept vectors; the latents tell something of the images."""

    images: ClassVar[bool] = True  # the latents are the site's images, encoded and noised

    concepts: Training = Training(optimizer="adam", lr=3e-2, epochs=12, schedule="cosine", warmup=5, max_grad_norm=1.0)
    """A site's training of its domain and class vectors (the paper: Adam with 0.1, 50 epochs of 16 images a class)."""
    signal: float = 0.0047
    """The share of the uploaded latents' variance that is image, ᾱ; near 1 they are nearly the images."""
    variation: float = 0.1
    """Standard deviation of what the server adds to the domain's vector of each sample."""

    def __post_init__(self) -> None:
        if not 0 <= self.signal < 1 or self.variation < 0:
            raise InputError("signal must be at least 0 and below 1, variation at least 0; check [algorithm]")

    @property
    def needs_generator(self) -> GeneratorSpec:
        return GeneratorSpec("concepts", self.concepts, self.signal, self.variation)
