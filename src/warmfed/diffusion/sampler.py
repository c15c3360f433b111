"""Sampling of latents: one loop for diffusers' schedulers, with classifier-free guidance in one batch."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.errors import InputError
from .pipeline_families import Condition, stacked

SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "ddim": ("DPMSolverMultistepScheduler", {"solver_order": 1}),  # first order: DDIM, for flows Euler
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
"""Class of diffusers for each sampler: DPM-Solver++ (Lu et al., 2022, arXiv:2211.01095), DDIM (Song et al., ICLR 2021), UniPC
(Zhao et al., NeurIPS 2023, arXiv:2302.04867), and LCM (arXiv:2310.04378) for bases that are distilled for few steps."""


def flows(config: Mapping[str, Any]) -> float:
    """Return the shift of a rectified flow's noise levels from a scheduler's configuration; 0 for a diffusion process."""
    if config.get("prediction_type") == "flow_prediction":
        return float(config.get("flow_shift") or 1.0)
    return float(config.get("shift") or 1.0) if "FlowMatch" in str(config.get("_class_name", "")) else 0.0


def scheduler(base: Any, sampler: str, spacing: str = "") -> Any:
    """Return a sampler for the noise schedule of a base's own scheduler.

    Args:
        base: the base's scheduler.
        sampler: a key of `SAMPLERS`.
        spacing: spacing of the steps: leading, linspace or trailing; empty: that of the base.

    Raises:
        InputError: if the sampler does not support a flow.
    """
    import diffusers

    kind, options = SAMPLERS[sampler]
    config = {"_class_name": type(base).__name__, **base.config}
    if shift := flows(config):
        if sampler == "lcm":
            raise InputError("the sampler lcm needs a diffusion process, but this base is a flow; set dpm++, ddim or unipc")
        options = {**options, "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    if spacing:
        options = {**options, "timestep_spacing": spacing}
    return getattr(diffusers, kind).from_config({**base.config, **options})


def timed(base: Any, sampler: str, steps: int, spacing: str = "", begin: int | None = None, device: Any = "cpu") -> Any:
    """Return the sampler of `scheduler` with its times set: `steps` times from `begin`, or from the last one.

    Raises:
        InputError: if the sampler does not support these steps with this noise schedule.
    """
    solver = scheduler(base, sampler, spacing)
    try:
        if begin is None:
            solver.set_timesteps(steps, device=device)
        elif begin + 1 < steps:
            raise ValueError(f"only {begin + 1} times are left from the start of the noise")
        else:
            times = (torch.linspace(begin + 1, 0, steps + 1)[:-1].round() - 1).int().tolist()
            solver.set_timesteps(timesteps=times, device=device)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the sampler {sampler} cannot take {steps} steps {'' if begin is None else f'from time {begin} '}with this "
            f"base ({error}); set another generator.sampler or generator.steps"
        ) from error
    return solver


@torch.inference_mode()
def draw(
    model: nn.Module,
    solver: Any,
    latents: Tensor,
    condition: Condition,
    against: Condition,
    guidance: float = 1.0,
    interval: tuple[float, ...] = (0.0, 1.0),
    rng: torch.Generator | None = None,
) -> Tensor:
    """Return the clean latents of noise [n, c, h, w].

    Args:
        model: model(noisy, time, condition) returns the denoiser's prediction.
        solver: a scheduler with its times set.
        latents: the noise.
        condition: conditioning of the samples, n rows.
        against: negative conditioning of the guidance, one row.
        guidance: scale of classifier-free guidance; 1: none.
        interval: range of the times with guidance, as shares of the last time; a step outside of it costs half.
        rng: source of the noise of samplers that add noise at each step.

    References:
        Guidance interval: Kynkäänniemi et al., NeurIPS 2024, arXiv:2404.07724.
    """
    last = solver.config.num_train_timesteps
    both = stacked(against, condition) if guidance != 1 else condition
    options = {"generator": rng} if "generator" in inspect.signature(solver.step).parameters else {}
    latents = latents * solver.init_noise_sigma
    for time, share in zip(solver.timesteps, (solver.timesteps / last).tolist(), strict=True):
        inputs = solver.scale_model_input(latents, time)
        if guidance == 1 or not interval[0] <= share <= interval[1]:
            predicted = model(inputs, time, condition)
        else:
            plain, guided = model(torch.cat([inputs, inputs]), time, both).chunk(2)
            predicted = plain + guidance * (guided - plain)
        latents = solver.step(predicted, time, latents, **options).prev_sample
    return latents
