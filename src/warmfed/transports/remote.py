"""Transport to remote sites over a `Channel`, which delivers bytes to a site by its name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from ..core import Exchange, Failure, Metrics, Reply
from ..core.admission import AdmissionPolicy, catch_failure
from ..core.messages import Message, encode
from ..core.tensors import Tensors
from .client import exchange
from .protocol import DIGEST, EVALUATE, FINISH, EvaluateReply, FinishReply, Models, Request, nest, opened


class Channel(Protocol):
    """Delivers request bytes to sites by name."""

    def ask(self, action: str, requests: Mapping[str, bytes], seconds: float) -> Iterator[tuple[str, bytes | Failure]]:
        """Deliver the request bytes to each site; yield (site, answer) in order of arrival.

        Args:
            action: name of the action: train.<stage>, evaluate or query.<name>.
            requests: request bytes by site.
            seconds: time limit; a site without an answer yields a `Failure`.
        """
        ...


@dataclass
class Remote:
    """Transport over a `Channel`. It decodes and checks the answers; a fault in an answer is a `Failure` of its site."""

    channel: Channel
    sites: tuple[str, ...]
    run: str
    config: str
    admission: AdmissionPolicy

    def send(
        self, step: int, stage: str, number: int, down: Mapping[str, Message]
    ) -> Iterator[tuple[str, Reply[Message] | Failure, tuple[Exchange, ...]]]:
        for site, answer in self._ask(
            f"train.{stage}", Request(self.run, "", self.config, stage, step, number, None), down, Reply
        ):
            if isinstance(answer, Failure):
                yield site, answer, ()
                continue
            up = catch_failure(partial(exchange, site, "up", answer.body.message))  # fails if the body is not a message
            if isinstance(up, Failure):
                yield site, up, ()
                continue
            yield site, answer.body, (exchange(site, "down", down[site]), replace(up, seconds=round(answer.seconds, 3)))

    def evaluate(self, down: Mapping[str, Message], model: Tensors | None) -> dict[str, Mapping[str, Metrics] | Failure]:
        asked = Request(self.run, "", self.config, EVALUATE, 0, 0, None)
        bodies = {site: Models(content, model) for site, content in down.items()}
        answers = dict(self._ask("evaluate", asked, bodies, EvaluateReply))
        return {s: a if isinstance(a, Failure) else nest(a.body.metrics) for s, a in ((s, answers[s]) for s in down)}

    def finish(self, down: Mapping[str, Message], model: Tensors | None) -> dict[str, str]:
        """Request each site to save its personal model; return their SHA-256 by site, without sites that fail."""
        asked = Request(self.run, "", self.config, FINISH, 0, 0, None)
        bodies = {site: Models(content, model) for site, content in down.items()}
        answers = {s: a for s, a in self._ask("query.finish", asked, bodies, FinishReply) if not isinstance(a, Failure)}
        return {site: answers[site].body.personal for site in sorted(answers) if DIGEST.fullmatch(answers[site].body.personal)}

    def _ask(self, action: str, asked: Request, bodies: Mapping[str, Message], body: type) -> Iterator[tuple[str, Any]]:
        requests = {site: encode(replace(asked, site=site, body=content)) for site, content in bodies.items()}
        for site, data in self.channel.ask(action, requests, self.admission.stage_timeout):
            if isinstance(data, Failure):
                yield site, data
                continue
            yield site, catch_failure(partial(opened, data, asked, site, body, self.admission.max_reply_bytes))
