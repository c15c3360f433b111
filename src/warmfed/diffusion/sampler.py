"""Drawing latents: diffusers' schedulers under one loop, with classifier-free guidance in one batch."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.errors import InputError
from .pipeline_families import Condition, stacked

SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "ddim": ("DPMSolverMultistepScheduler", {"solver_order": 1}),  # of first order DPM-Solver++ is DDIM, for flows Euler
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
"""diffusers' class for each sampler: DPM-Solver++ (Lu et al., 2022, arXiv:2211.01095), DDIM (Song et al., ICLR 2021), UniPC
(Zhao et al., NeurIPS 2023, arXiv:2302.04867), and LCM (arXiv:2310.04378) for bases that were distilled for a few steps."""

SPACINGS = ("", "leading", "linspace", "trailing")


def flows(config: Mapping[str, Any]) -> float:
    """The shift of a rectified flow's noise levels, of a scheduler's config; 0: it is a diffusion process."""
    if config.get("prediction_type") == "flow_prediction":
        return float(config.get("flow_shift") or 1.0)
    return float(config.get("shift") or 1.0) if "FlowMatch" in str(config.get("_class_name", "")) else 0.0


def scheduler(base: Any, sampler: str, spacing: str = "") -> Any:
    """A sampler for the noise schedule of a base's own scheduler.

    Args:
        spacing: where its steps lie: leading, linspace or trailing; empty: where the base's own are.
    """
    import diffusers

    kind, options = SAMPLERS[sampler]
    config = {"_class_name": type(base).__name__, **base.config}
    if shift := flows(config):
        if sampler == "lcm":
            raise InputError("the sampler lcm is for diffusion processes, and this base is a flow; choose dpm++, ddim or unipc")
        options = {**options, "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    if spacing:
        options = {**options, "timestep_spacing": spacing}
    return getattr(diffusers, kind).from_config({**base.config, **options})


def timed(base: Any, sampler: str, steps: int, spacing: str = "", begin: int | None = None, device: Any = "cpu") -> Any:
    """The same sampler, its times set: all from the last one on, or `steps` of them from `begin` on.

    Raises:
        InputError: the sampler cannot take so many steps, or from there, with this noise schedule.
    """
    solver = scheduler(base, sampler, spacing)
    try:
        if begin is None:
            solver.set_timesteps(steps, device=device)
        elif begin + 1 < steps:
            raise ValueError(f"only {begin + 1} times are left from where the noise begins")
        else:
            times = (torch.linspace(begin + 1, 0, steps + 1)[:-1].round() - 1).int().tolist()
            solver.set_timesteps(timesteps=times, device=device)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the sampler {sampler} cannot take {steps} steps {'' if begin is None else f'from time {begin} on '}with this "
            f"base ({error}); set generator.sampler or generator.steps to others"
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
    """Clean latents of noise [n, c, h, w].

    Args:
        model: model(noisy, time, condition) predicts what the base does.
        solver: a scheduler whose times are set.
        condition: what is drawn, n rows.
        against: what guidance leads away from, one row.
        guidance: scale of classifier-free guidance; 1: none.
        interval: the part of the times, in shares of the last one, in which there is guidance: elsewhere a step costs half
            (Kynkäänniemi et al., NeurIPS 2024, arXiv:2404.07724).
        rng: for samplers that draw noise at each step.
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
