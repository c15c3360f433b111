"""Client states between stages: in this process or, with a folder, on disk."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from ..core import ClientState, Reply
from ..core.messages import Message, decode, encode, message
from ..utils.errors import InputError
from ..utils.files import read_checksummed, write_checksummed
from ..utils.paths import exists


@message("memories.Memory")
class ClientRecord:
    """A site's last reply with its state, its step, and the seconds of work."""

    step: int
    seconds: float
    reply: Message

    @property
    def answer(self) -> Reply[Message]:
        """Return the reply, typed as such."""
        return cast("Reply[Message]", self.reply)


def snapshot_path(folder: Path, site: str) -> Path:
    """Return the path of a site's training snapshot in a folder of client states; it exists until the reply is saved."""
    return folder / f"{site}.unfinished"


@dataclass
class ClientStates:
    """Client states by site.

    With a folder, each record is written to disk at once, with a checksum. Without one, only the states are held in
    memory, and replies cannot be repeated.
    """

    folder: Path | None = None
    _states: dict[str, ClientState] = field(default_factory=dict, init=False)

    def save(self, site: str, step: int, seconds: float, reply: Reply[Message]) -> None:
        """Save a reply with its state, and remove the training snapshot of the site."""
        if self.folder is not None:
            write_checksummed(self._path(site), encode(ClientRecord(step, seconds, reply)))
            snapshot_path(self.folder, site).unlink(missing_ok=True)
        elif reply.state is not None:
            self._states[site] = reply.state
        else:
            self._states.pop(site, None)

    def load(self, site: str) -> ClientRecord | None:
        """Return the record of a site, or None if none is on disk; raise `InputError` if its file is damaged."""
        if self.folder is None or not exists(self._path(site)):
            return None
        what = f"the client state of site {site!r}"
        return decode(read_checksummed(self._path(site), what), ClientRecord, f"{what} ({self._path(site)})")

    def answered(self, site: str, step: int) -> ClientRecord | None:
        """Return the record if it is of this step, else None; raise `InputError` if it is of a later step."""
        record = self.load(site)
        if record is not None and record.step > step:
            raise InputError(
                f"site {site!r} has replied to step {record.step}, but the server is at step {step}: "
                "the folder mixes two runs; restore it or start a new run"
            )
        return record if record is not None and record.step == step else None

    def state(self, site: str) -> ClientState:
        """Return the state of a site, or None if it has none yet."""
        record = self.load(site)
        return record.answer.state if record else self._states.get(site)

    def _path(self, site: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{site}.safetensors"
