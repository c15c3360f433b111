"""Builds the generator that an algorithm needs."""

from dataclasses import replace

from ..core import GeneratorSpec
from ..diffusion.concept_inversion import Concepts
from ..diffusion.generator import LatentDiffusion


def build_generator(settings: LatentDiffusion, spec: GeneratorSpec | None) -> LatentDiffusion | Concepts | None:
    """Return the generator for an algorithm's contexts, or None if it needs none.

    Args:
        settings: the generator of the configuration.
        spec: `Algorithm.needs_generator`.
    """
    if spec is None:
        return None
    settings = replace(settings, training=spec.training or settings.training)
    match spec.kind:
        case "adapter":
            return settings
        case "prompts":
            plain = replace(settings.lora, dora=False, textual_inversion=False, prior_loss_weight=0.0)
            return replace(settings, target_modules="none", prompts=True, lora=plain)
        case "concepts":
            return Concepts(settings, spec.signal, spec.variation)
