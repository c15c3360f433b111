"""A transport with sites that fail or send wrong replies."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from warmfed.core import Exchange, Failure, Metrics, Reply
from warmfed.core.messages import Message
from warmfed.core.tensors import Tensors
from warmfed.transports.in_process import InProcess


@dataclass
class Faulty:
    """The sites of the toy federation; some of them fail in some steps."""

    inner: InProcess
    faults: Mapping[tuple[int, str], Callable[[Reply], Reply | Failure]]
    sites: tuple[str, ...] = ("a", "b", "c", "d")

    def send(
        self, step: int, stage: str, number: int, down: Mapping[str, Message]
    ) -> Iterator[tuple[str, Reply | Failure, tuple[Exchange, ...]]]:
        for site, reply, exchanges in self.inner.send(step, stage, number, down):
            yield site, self.faults.get((step, site), lambda r: r)(reply), exchanges

    def evaluate(self, down: Mapping[str, Message], model: Tensors | None) -> Mapping[str, Mapping[str, Metrics]]:
        return self.inner.evaluate(down, model)
