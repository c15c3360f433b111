"""FGL: a warm start from prompts alone, then FedAvg with server fine-tuning.

Zhang et al., "Federated Generative Learning with Foundation Models", 2023, arXiv:2306.16064; class prompts, multi-round form.

The sites send their class names only. The server samples from the unadapted base by prompts, trains the initial model on the
samples, and fine-tunes on them after each aggregation.

Departures: the samples are filtered as in WarmFed, so that adapters are the only difference between the two.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch

from ..algorithms.shared.synthetic_data import Server
from ..core import ClientContext, Empty, Metrics, Replies, Reply, ServerContext
from ..core.messages import message
from ..core.tensors import rows
from .shared.synthetic_data import WarmStarted, check_classes, classes_of


@message("fgl.Classes")
class Classes:
    """The classes that a site holds: all that it sends before the warm start."""

    classes: tuple[int, ...]


@final
@dataclass(frozen=True)
class FGL(WarmStarted[Classes]):
    """Train a classifier on samples of prompts, then run FedAvg with fine-tuning on a synthetic subset."""

    images: ClassVar[bool] = False
    offers: ClassVar[tuple[type, ...]] = (Classes,)

    def adapt(self, received: Empty, state: None, ctx: ClientContext) -> Reply[Classes]:
        return Reply(Classes(classes_of(ctx)), None, float(rows(ctx.data["train"])), {})

    def check_upload(self, reply: Reply[Classes], site: str, ctx: ServerContext) -> None:
        check_classes(reply.message.classes, ctx)  # a site sends class names only

    def collect(self, server: Server, replies: Replies[Classes], ctx: ServerContext) -> tuple[Server, Metrics]:
        return replace(server, classes={site: torch.tensor(r.message.classes) for site, r in replies.items()}), {}
