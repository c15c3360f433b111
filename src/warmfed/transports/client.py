"""Runtime of one site, equal for every transport."""

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
    """File for the snapshot of this site's unfinished training; None: no snapshots."""
    progress: Callable[[str, int, int], None] = no_progress

    def local(self, stage: str, number: int) -> ClientContext:
        """Return the context of a client function, with the random stream of this stage and site."""
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

    def _state_or_init(self, received: Message, state: ClientState) -> ClientState:
        return self.algorithm.init_client_state(received, self.local("enter", 0)) if state is None else state

    def work(self, stage: str, number: int, received: Message, state: ClientState) -> Reply[Message]:
        """Return the reply of the stage's client function.

        Raises:
            InputError: The algorithm has no client function for this stage.
        """
        client = next((s.client for s in self.algorithm.stages() if s.name == stage), None)
        if client is None:
            raise InputError(
                f"site {self.site!r} received a request for stage {stage!r}, which its algorithm does not have; "
                "install the same version of warmfed everywhere"
            )
        return client(received, self._state_or_init(received, state), self.local(stage, number))

    def model(self, received: Message, state: ClientState) -> Tensors | None:
        """Return the site's personal model, or None if there is none yet."""
        return self.algorithm.client_model(received, self._state_or_init(received, state))

    def evaluate(self, received: Message, state: ClientState, model: Tensors | None) -> dict[str, Metrics]:
        """Return the metrics of the global and of the personal model on the validation and test rows, by "view/split"."""
        personal = self.model(received, state)
        held = tuple(self.data["train"]["label"].unique().tolist()) if "train" in self.data else None
        return {
            f"{name}/{split}": self.task.metrics(tensors, self.data[split], self.device, held)
            for name, tensors in (("global", model), ("personal", personal))
            if tensors is not None
            for split in ("validation", "test")
            if split in self.data
        }


def exchange(site: str, direction: str, message: Message, data: bytes | None = None) -> Exchange:
    """Return the ledger's entry for a message.

    Args:
        data: the encoded message; None: it is encoded here.
    """
    data = encode(message) if data is None else data
    return Exchange(site, direction, kind(type(message)), len(data), len(tensors_of(message)), digest(data))
