"""What the sites keep between messages, in this process and, with a folder, on disk."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from ..core import ClientState, Reply
from ..core.messages import Message, decode, encode, message
from ..utils.errors import InputError
from ..utils.files import read_checksummed, write_checksummed


@message("memories.Memory")
class ClientRecord:
    """A site's last reply, with the state in it; the step that it answered, and how long it worked for it."""

    step: int
    seconds: float
    reply: Message

    @property
    def answer(self) -> Reply[Message]:
        """The reply, as what it is."""
        return cast("Reply[Message]", self.reply)


def snapshot_path(folder: Path, site: str) -> Path:
    """Where in a folder of memories the snapshot of a site's training lies, until the site has answered."""
    return folder / f"{site}.unfinished"


@dataclass
class ClientStates:
    """The sites' memories by name. With a folder, each is written there, under a seal, as soon as it is made, and nothing
    is held here; without one only the states are held, and no answer can be repeated."""

    folder: Path | None = None
    _states: dict[str, ClientState] = field(default_factory=dict, init=False)

    def save(self, site: str, step: int, seconds: float, reply: Reply[Message]) -> None:
        if self.folder is not None:
            write_checksummed(self._path(site), encode(ClientRecord(step, seconds, reply)))
            snapshot_path(self.folder, site).unlink(missing_ok=True)
        elif reply.state is not None:
            self._states[site] = reply.state
        else:
            self._states.pop(site, None)

    def load(self, site: str) -> ClientRecord | None:
        """None: nothing of the site is on disk. Raises `InputError` where its file is damaged."""
        if self.folder is None or not self._path(site).exists():
            return None
        what = f"the memory of site {site!r}"
        return decode(read_checksummed(self._path(site), what), ClientRecord, f"{what} ({self._path(site)})")

    def answered(self, site: str, step: int) -> ClientRecord | None:
        """The memory of this step, if the site has answered it; raises `InputError` where it has answered a later one."""
        memory = self.load(site)
        if memory is not None and memory.step > step:
            raise InputError(
                f"site {site!r} has answered step {memory.step}, but the server is at step {step}: "
                "the folder mixes two runs; restore it or start the run anew"
            )
        return memory if memory is not None and memory.step == step else None

    def state(self, site: str) -> ClientState:
        """The state that a site keeps; None before it has any."""
        memory = self.load(site)
        return memory.answer.state if memory else self._states.get(site)

    def _path(self, site: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{site}.safetensors"
