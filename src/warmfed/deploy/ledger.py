"""Audit log of the data a site has sent, for its data-protection officer, from the ledger that the site writes.

A site's ledger has a line for each message, written before the message is sent. The ledger of a run folder (all sites on one
machine) has the same messages without the names of their tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from .. import algorithms  # noqa: F401  declares the messages of all algorithms
from ..core.messages import KINDS
from ..report.page import publish
from ..report.parts import MISSING, Section, Table, cells, size
from ..utils.errors import InputError
from ..utils.files import read_lines
from ..utils.names import plain_name
from ..utils.paths import exists
from .policy import Policy, table
from .site import read_site


@dataclass(frozen=True)
class Ledger:
    """Messages that one site has sent, in order."""

    site: str
    lines: tuple[Mapping[str, Any], ...]
    policy: Policy | None = None
    """Current policy of the site; None for the ledger of a run folder."""

    @property
    def bytes(self) -> int:
        return _bytes(self.lines)


def _bytes(lines: Sequence[Mapping[str, Any]]) -> int:
    return sum(line["bytes"] for line in lines)


def read(folder: Path, site: str = "") -> Ledger:
    """Return the ledger of a site's folder, or of one site of a run folder.

    Raises:
        InputError: The ledger is missing or damaged, or has no such site.
    """
    site = plain_name(site)
    if exists(folder / "site.toml"):
        config = read_site(folder)
        if site not in ("", config.name):
            raise InputError(f"{folder} is the folder of site {config.name!r}, not of {site!r}; remove --site")
        site, policy, path = config.name, config.policy, config.path(config.work) / "ledger.jsonl"
        lines = read_lines(path, "the site's ledger") if exists(path) else []
    else:
        policy, path = None, folder / "ledger.jsonl"
        sent = [_line(line, path) for line in read_lines(path, "the run's ledger")]
        sites = sorted({line["site"] for line in sent if line.get("direction") == "up"})
        if site not in sites:
            raise InputError(f"the run has no site {site!r}; set --site to one of: {', '.join(sites) or 'none'}")
        lines = [line for line in sent if line.get("direction") == "up" and line["site"] == site]
    for line in lines:
        if not {"stage", "number", "bytes", "sha256"} <= _line(line, path).keys():
            raise InputError(f"{path} is damaged: a line lacks stage, number, bytes or sha256; restore it from a backup")
    return Ledger(site, tuple(lines), policy)


def _line(line: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(line, dict):
        raise InputError(f"{path} is damaged: a line is not a table; restore it from a backup")
    return line


def meaning(kind: str) -> str:
    """Return the description of a kind of message: the summary of its class's docstring."""
    return " ".join((KINDS[kind].__doc__ or "").split("\n\n")[0].split()) if kind in KINDS else MISSING


def tables(ledger: Ledger) -> tuple[Table, ...]:
    """Return the tables of a ledger: kinds of messages, their tensors and numbers, and all messages.

    For a site's own ledger, also its refusals and its policy.
    """
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for line in ledger.lines:
        kinds.setdefault(line.get("kind", f"the reply to {line['stage']}"), []).append(line)
    return (
        Table(
            "Kinds of messages",
            ("kind", "messages", "bytes", "description"),
            tuple(cells(kind, str(len(them)), size(_bytes(them)), meaning(kind)) for kind, them in kinds.items()),
            words=("description",),
        ),
        Table(
            "Contents",
            ("name", "kind of message", "type", "shape"),
            tuple(row for kind, them in kinds.items() for row in _contents(kind, them)),
            words=("kind of message", "type", "shape"),
        ),
        Table(
            "All messages",
            ("when", "run", "algorithm", "stage", "round", "kind", "bytes", "SHA-256"),
            tuple(
                cells(
                    *_where(line), str(line["number"] + 1),
                    line.get("kind", MISSING), f"{line['bytes']:,}", line["sha256"],
                )
                for line in ledger.lines
            ),
            words=("run", "algorithm", "stage", "kind", "SHA-256"),
        ),
        *(() if ledger.policy is None else (refusals(ledger), rules(ledger.policy))),
    )  # fmt: skip


def _where(line: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the time of a message, and run, algorithm and stage of its request."""
    return tuple(str(line.get(name) or MISSING) for name in ("when", "run", "algorithm", "stage"))


def refusals(ledger: Ledger) -> Table:
    """Return a table of the refused requests with the reasons."""
    rows = tuple(cells(*_where(line), line["reason"]) for line in ledger.lines if "reason" in line)
    header = ("when", "run", "algorithm", "stage", "reason")
    return Table("Refused requests", header, rows, words=header[1:])


def rules(policy: Policy) -> Table:
    """Return a table of a site's policy, with a row for each setting."""
    plain = table(policy)
    limits = {f"limits: {name}": value for name, value in plain.pop("limits").items()}
    rows = tuple(cells(name, _text(value)) for name, value in {**plain, **limits}.items())
    return Table("The site's policy", ("setting", "value"), rows, words=("value",))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return (value if isinstance(value, str) else ", ".join(value)) or "none"


def _contents(kind: str, messages: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Return a row for each tensor and number in the messages of a kind."""
    found = dict.fromkeys((name, what, MISSING) for name, what in _declared(kind).items())
    for message in messages:
        tensors = message.get("tensors", 0)
        if isinstance(tensors, Mapping):
            named = {name: (dtype, " × ".join(map(str, shape)) or "one") for name, (dtype, shape) in tensors.items()}
            found |= dict.fromkeys((name, *what) for name, what in named.items())
        elif tensors:
            found[f"{tensors} tensors", "not named here", MISSING] = None
        numbers = [*message.get("metrics", {}), *(["weight"] if "weight" in message else [])]
        found |= dict.fromkeys((name, "number", "one") for name in numbers)
    return [cells(name, kind, dtype, shape) for name, dtype, shape in found]


_WORDS = {
    str: "text", int: "number", float: "number", bool: "yes or no", tuple[str, ...]: "texts", tuple[float, ...]: "numbers",
    Mapping[str, float]: "numbers by name",
}  # fmt: skip
"""Names of the types of a message's fields, except tensors and messages, whose contents are listed one by one."""


def _declared(kind: str) -> dict[str, str]:
    """Return the text and number fields of a kind of message, from its declaration."""
    types = get_type_hints(KINDS[kind]) if kind in KINDS else {}
    return {name: _WORDS[declared] for name, declared in types.items() if declared in _WORDS}


def write(ledger: Ledger, path: Path) -> Path:
    """Write the ledger as one self-contained HTML page and return its path."""
    overview, contents, every, *own = tables(ledger)
    how = "Each message that the site has sent, recorded by the site before it was sent. The site has sent nothing else."
    return publish(
        path,
        title=f"Messages sent by site {ledger.site}",
        subtitle=f"{len(ledger.lines)} messages · {size(ledger.bytes)}",
        sections=[
            Section("kinds", "Kinds of messages", how, tables=[overview]),
            Section("contents", "Contents", "Names, types and shapes of all tensors and numbers.", tables=[contents]),
            Section("messages", "All messages", "SHA-256 of the sent bytes.", tables=[every]),
            *(
                [Section("policy", "Refusals and policy", "Refused requests, and the current policy of the site.", tables=own)]
                if own
                else []
            ),
        ],
    )
