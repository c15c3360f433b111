"""A site's runtime: the same object behind every transport."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core import Algorithm, ClientContext, ClientState, Exchange, Generator, Metrics, Reply, Task, no_progress, prompts_of
from ..core.messages import Message, digest, encode, kind, tensors_of
from ..core.rng import stream
from ..core.tensors import Table, Tensors
from ..utils.errors import InputError


@dataclass(frozen=True)
class Client:
    """Runs an algorithm's client functions on one site's data."""

    site: str
    algorithm: Algorithm
    task: Task
    data: Mapping[str, Table]
    seed: int = 0
    prompts: tuple[str, ...] = ()
    generator: Generator | None = None
    device: str = "cpu"
    snapshot_path: Path | None = None
    """Where an unfinished training of this site may lie."""
    progress: Callable[[str, int, int], None] = no_progress

    def local(self, stage: str, number: int) -> ClientContext:
        return ClientContext(
            task=self.task,
            data=self.data,
            rng=stream(self.seed, stage, number, self.site),
            site=self.site,
            prompts=prompts_of(self.site, self.prompts),
            generator=self.generator,
            device=self.device,
            snapshot_path=self.snapshot_path,
            progress=self.progress,
        )

    def _entered(self, down: Message, state: ClientState) -> ClientState:
        return self.algorithm.init_client_state(down, self.local("enter", 0)) if state is None else state

    def work(self, stage: str, number: int, down: Message, state: ClientState) -> Reply[Message]:
        client = next((s.client for s in self.algorithm.stages() if s.name == stage), None)
        if client is None:
            raise InputError(
                f"site {self.site!r} was asked for stage {stage!r}, which its algorithm does not have; do all run one version?"
            )
        return client(down, self._entered(down, state), self.local(stage, number))

    def model(self, down: Message, state: ClientState) -> Tensors | None:
        """The model that the site would use; None: nothing yet."""
        return self.algorithm.client_model(down, self._entered(down, state))

    def evaluate(self, down: Message, state: ClientState, model: Tensors | None) -> dict[str, Metrics]:
        """The metrics of the global and of the site's own model on the site's validation and test rows."""
        personal = self.model(down, state)
        return {
            f"{name}/{split}": self.task.metrics(tensors, self.data[split], self.device)
            for name, tensors in (("global", model), ("personal", personal))
            if tensors is not None
            for split in ("validation", "test")
            if split in self.data
        }


def exchange(site: str, direction: str, message: Message, data: bytes | None = None) -> Exchange:
    """The ledger's entry for a message; `data`: its bytes, where they are at hand."""
    data = encode(message) if data is None else data
    return Exchange(site, direction, kind(type(message)), len(data), len(tensors_of(message)), digest(data))
