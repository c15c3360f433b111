"""The record, the ledger and the checkpoint of a run: written after each stage, read to resume."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core import Round, ServerState
from ..core.messages import Message, decode, encode, message
from ..transports.client_state import ClientStates
from ..utils.errors import InputError
from ..utils.files import (
    read_checksummed,
    read_lines,
    write_checksummed,
    write_lines,
)
from ..utils.paths import exists
from ..utils.version import __version__
from .backend import client_states_folder
from .prepare import PreparedRun
from .summary import history_sha256


@message("runs.Checkpoint")
class Checkpoint:
    """State of the server after `steps` stages."""

    version: str
    run: str
    steps: int
    history: str
    """SHA-256 of the records so far."""
    server: Message | None


class Recorder:
    """Appends each stage to the run folder: its record, its lines of the ledger, and the checkpoint, in this order.

    If the process is killed in between, `load_checkpoint` drops the surplus record.
    """

    def __init__(self, prepared: PreparedRun, folder: Path, records: list[dict[str, Any]]) -> None:
        """Continue after `records`; write an empty checkpoint if there are none."""
        self.run, self.folder, self.records = prepared.fingerprint, folder, records
        ledger = read_lines(folder / "ledger.jsonl", "the run's ledger") if records else []
        self._ledger = [line for line in ledger if line["step"] < len(records)]
        if not records:
            self._save(None)

    def append(self, done: Round, peak: float) -> dict[str, Any]:
        """Add a stage's record and ledger lines, without writing them; return the record, to which more may be added.

        Args:
            done: the stage.
            peak: peak memory of the stage in MB.
        """
        seconds = round(done.seconds, 3)
        self.records.append({**done.results(), "seconds": seconds, "peak_memory_mb": peak})
        where = {"step": done.step, "stage": done.stage, "number": done.number}
        for exchange in done.exchanges:
            self._ledger.append(where | {key: value for key, value in asdict(exchange).items() if value is not None})
        self._ledger.append({**where, "seconds": seconds, "peak_memory_mb": peak})
        return self.records[-1]

    def write(self, server: ServerState) -> None:
        """Write the records, the ledger and a checkpoint with the server's state."""
        write_lines(self.folder / "rounds.jsonl", self.records)
        write_lines(self.folder / "ledger.jsonl", self._ledger)
        self._save(server)

    def _save(self, server: ServerState | None) -> None:
        state = Checkpoint(__version__, self.run, len(self.records), history_sha256(self.records), server)
        write_checksummed(self.folder / "checkpoint" / "server.safetensors", encode(state))


def load_checkpoint(prepared: PreparedRun, folder: Path) -> tuple[list[dict[str, Any]], ServerState | None]:
    """Return the records and the server's state of an unfinished run, checked against each other; write nothing."""
    path = folder / "checkpoint" / "server.safetensors"
    if not exists(path):
        if exists(folder / "rounds.jsonl"):
            raise InputError(f"{path} is missing, but the run has records; restore it or start a new run")
        return [], None
    checkpoint = decode(read_checksummed(path, "the checkpoint"), Checkpoint, f"the checkpoint {path}")
    if checkpoint.version != __version__:
        raise InputError(
            f"{folder} was started with warmfed {checkpoint.version}, this is {__version__}; finish it with that version"
        )
    if checkpoint.run != prepared.fingerprint:
        raise InputError(
            f"{folder} was started with other settings, data or base than config.toml has now; restore them or start a new run"
        )
    records = read_lines(folder / "rounds.jsonl", "the run's records")[: checkpoint.steps] if checkpoint.steps else []
    ledger = read_lines(folder / "ledger.jsonl", "the run's ledger") if checkpoint.steps else []
    if not all(isinstance(line, dict) and isinstance(line.get("step"), int) for line in (*records, *ledger)):
        raise InputError(f"{folder / 'ledger.jsonl'} or rounds.jsonl beside it is damaged; restore it or start a new run")
    if history_sha256(records) != checkpoint.history:
        raise InputError(f"{folder / 'rounds.jsonl'} differs from the checkpoint; restore it or start a new run")
    client_states = ClientStates(client_states_folder(folder))
    for site in prepared.federation.sites:
        client_states.load(site)  # raises if the file is damaged, before anything is written
    return records, checkpoint.server
