"""Protocol between a server and remote sites, independent of the channel.

Requests and answers are messages: `messages.encode` encodes them, and `messages.decode` validates them. An answer names
its run, site, step and stage. An answer to another request is refused.
"""

import re
from collections.abc import Mapping
from typing import Any

from ..core import SPLITS
from ..core.messages import Message, decode, message
from ..core.tensors import Tensors
from ..utils.errors import InputError, printable

HELLO, EVALUATE, FINISH, REFUSED = "hello", "evaluate", "finish", "refused"
"""Actions beside the algorithm's stages."""


@message("wire.Request")
class Request:
    """Request from the server to a site."""

    run: str
    """Identifier of one run folder; a new run with equal settings has another."""
    site: str
    """Name of the site; empty in `hello`, which a node gets before its site is confirmed."""
    config: str
    """The run's configuration, as TOML."""
    stage: str
    step: int
    number: int
    body: Message | None


@message("wire.Answer")
class Answer:
    """Answer of a site to a request."""

    run: str
    site: str
    stage: str
    step: int
    number: int
    seconds: float
    """Seconds of work at the site."""
    body: Message


@message("wire.Refusal")
class Refusal:
    """Body of an answer that refuses the request, with the reason."""

    reason: str


@message("wire.Card")
class SiteInfo:
    """Description of a site: values that must be equal at all sites, and the rows and digests of its tables."""

    version: str
    federation: str
    classes: tuple[str, ...]
    template: str
    shape: tuple[float, ...]
    rows: Mapping[str, float]
    digests: tuple[str, ...]
    """SHA-256 of the tables in the order of `core.SPLITS`."""
    base: str
    start: str


DIGEST = re.compile(r"[0-9a-f]{64}")
_ROWS, _SECONDS = 10**12, 10**9


def check_site_info(info: SiteInfo, most: int = 0) -> None:
    """Raise `InputError` if a value of a site's description is out of range.

    Args:
        most: largest number of rows over all splits; 0: no limit.
    """
    texts = {"version": info.version, "federation": info.federation, "base": info.base, "start": info.start}
    for name, text in (*texts.items(), *((f"class {i}", each) for i, each in enumerate(info.classes[:10_001]))):
        _expect(len(text) <= 200 and text.isprintable(), name, text, "at most 200 printable characters")
    _expect(len(info.template) <= 1000 and info.template.isprintable(), "template", info.template, "1,000 printable characters")
    count = len(info.classes)
    _expect(2 <= count <= 10_000 and len(set(info.classes)) == count, "number of classes", count, "2 to 10,000 different ones")
    sides = len(info.shape) == 3 and all(_whole(n, 1, 65_535) for n in info.shape)
    _expect(sides, "shape", info.shape, "three whole numbers from 1 to 65,535")
    rows = info.rows.keys() == set(SPLITS) and all(_whole(n, 0, _ROWS) for n in info.rows.values())
    _expect(rows, "rows", dict(info.rows), f"a whole number for each of {', '.join(SPLITS)}")
    total = int(sum(info.rows.values()))
    _expect(not most or total <= most, "number of rows", total, f"at most {most}")
    digests = len(info.digests) == len(SPLITS) and all(DIGEST.fullmatch(each) for each in info.digests)
    _expect(digests, "digests", info.digests, f"{len(SPLITS)} SHA-256 in hexadecimal")


def _whole(number: float, least: int, most: int) -> bool:
    return least <= number <= most and number == int(number)  # `in range` compares a float with each integer


def _expect(good: bool, what: str, value: object, wanted: str) -> None:
    if not good:
        raise InputError(
            f"its {what} is {printable(repr(value), 80)}, expected {wanted}; install the same version of warmfed everywhere"
        )


@message("wire.Models")
class Models:
    """The message for a site and the global model: the request body of `evaluate` and `finish`."""

    down: Message
    model: Tensors | None


@message("wire.Measures")
class EvaluateReply:
    """Metrics of a site, by view/split/name."""

    metrics: Mapping[str, float]


@message("wire.Kept")
class FinishReply:
    """SHA-256 of the site's personal model; empty if it has none."""

    personal: str


def opened(data: bytes, asked: Request, site: str | None, body: type, limit: int = 0) -> Any:
    """Return the answer in `data`, checked against its request.

    Args:
        data: bytes of the answer.
        asked: the request.
        site: name of the site; None: any site.
        body: class of the answer's body.
        limit: largest answer in bytes; 0: no limit.

    Raises:
        InputError: The answer is too large or damaged, is for another run, step or site, is a refusal, or has another body.
    """
    if limit and len(data) > limit:
        raise InputError(f"its answer has {len(data):,} bytes, expected at most {limit:,} (server.max_reply_bytes)")
    answer = decode(data, Answer, "its answer")
    for field in ("run", "step", "stage", "number"):
        if getattr(answer, field) != getattr(asked, field):
            raise InputError(
                f"its answer is for {field} {printable(repr(getattr(answer, field)), 80)}, "
                f"expected {getattr(asked, field)!r} (a replay?)"
            )
    if site is not None and answer.site != site:
        raise InputError(f"its answer names site {printable(repr(answer.site), 80)}, expected {site!r}")
    if not 0 <= answer.seconds <= _SECONDS:
        raise InputError(f"it worked for {answer.seconds} seconds, expected 0 to {_SECONDS}")
    if isinstance(answer.body, Refusal):
        raise InputError(f"it refused: {printable(answer.body.reason)}")
    if not isinstance(answer.body, body):
        raise InputError(f"its answer is of kind {type(answer.body).__name__}, expected {body.__name__}")
    return answer


def nest(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return nested metrics: {"global/test/accuracy": 1.0} becomes {"global/test": {"accuracy": 1.0}}."""
    views: dict[str, dict[str, float]] = {}
    for path, value in metrics.items():
        view, _, name = path.rpartition("/")
        views.setdefault(view, {})[name] = value
    return views
