"""Tasks and settings of registered names; settings are keys of the configuration, below the user's own."""

BOTH = ("classify", "denoise")
DRAWS = ("denoise",)
"""Tasks of an entry."""

DENOISE = {"task": "denoise"}
CONVERGED = {"algorithm.budget.until": "validation"}
PUBLIC = {"model.start": "public"}
AUTO = {"model.start": "auto"}
PAPER = {
    "algorithm.distill": "dynamic",
    "algorithm.gate": False,
    "algorithm.local.lr": 0.02,
    "algorithm.personal_gate": False,
    "algorithm.replay": 0,
    "algorithm.synthesis.classes": "held",
    "algorithm.synthesis.contradicted": 0.0,
    "algorithm.synthesis.filter": "none",
}
"""WarmFed as its paper describes it, from random weights."""
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
