"""A context of one toy site, and named weights of the toy model."""

import torch
import toy

from warmfed.core import ClientContext
from warmfed.core.rng import stream
from warmfed.tasks import Classify


def local(purpose: str = "identity", site: str = "c", task: Classify = toy.TASK) -> ClientContext:
    return ClientContext(task, toy.SITES[site], stream(purpose), site, toy.PROMPTS, toy.Means())


def weights(*key: object) -> dict[str, torch.Tensor]:
    return dict(toy.TASK.init(stream(*key)))
