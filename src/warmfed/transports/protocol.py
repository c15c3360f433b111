"""What crosses between a server and its sites where they are on different machines, whatever carries the bytes.

A request and its answer are messages like all others: `messages.encode` makes their bytes, `messages.decode` takes
nothing on trust. An answer names run, site, step and stage; one that was made for anything else is refused.
"""

import re
from collections.abc import Mapping
from typing import Any

from ..core import SPLITS
from ..core.messages import Message, decode, message
from ..core.tensors import Tensors
from ..utils.errors import InputError, printable

HELLO, EVALUATE, FINISH, REFUSED = "hello", "evaluate", "finish", "refused"
"""What is asked beside the algorithm's own stages."""


@message("wire.Request")
class Request:
    """What the server asks of a site."""

    run: str
    """Names one run folder; a new run with equal settings has another."""
    site: str
    """Whom it is for; empty in `hello`, where the server does not know."""
    config: str
    """The run's configuration, as TOML."""
    stage: str
    step: int
    number: int
    body: Message | None


@message("wire.Answer")
class Answer:
    """What a site answers."""

    run: str
    site: str
    stage: str
    step: int
    number: int
    seconds: float
    """How long the site worked for it."""
    body: Message


@message("wire.Refusal")
class Refusal:
    """The body of an answer that is none: why."""

    reason: str


@message("wire.Card")
class SiteInfo:
    """A site presents itself: what must be equal everywhere, and its tables' rows and digests."""

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


def check_site_info(card: SiteInfo, most: int = 0) -> None:
    """Raise `InputError` if a card holds anything but what a site's card may hold.

    Args:
        most: rows that a site may declare, all splits together; 0: any number.
    """
    texts = {"version": card.version, "federation": card.federation, "base": card.base, "start": card.start}
    for name, text in (*texts.items(), *((f"class {i}", each) for i, each in enumerate(card.classes[:10_001]))):
        _expect(len(text) <= 200 and text.isprintable(), name, text, "at most 200 printable characters")
    _expect(len(card.template) <= 1000 and card.template.isprintable(), "template", card.template, "1,000 printable characters")
    count = len(card.classes)
    _expect(2 <= count <= 10_000 and len(set(card.classes)) == count, "number of classes", count, "2 to 10,000 different ones")
    sides = len(card.shape) == 3 and all(_whole(n, 1, 65_535) for n in card.shape)
    _expect(sides, "shape", card.shape, "three whole numbers from 1 to 65,535")
    rows = card.rows.keys() == set(SPLITS) and all(_whole(n, 0, _ROWS) for n in card.rows.values())
    _expect(rows, "rows", dict(card.rows), f"a whole number for each of {', '.join(SPLITS)}")
    total = int(sum(card.rows.values()))
    _expect(not most or total <= most, "number of rows", total, f"at most {most}")
    digests = len(card.digests) == len(SPLITS) and all(DIGEST.fullmatch(each) for each in card.digests)
    _expect(digests, "digests", card.digests, f"{len(SPLITS)} SHA-256 in hexadecimal")


def _whole(number: float, least: int, most: int) -> bool:
    return least <= number <= most and number == int(number)  # `in range` looks at each whole number for a float


def _expect(good: bool, what: str, value: object, wanted: str) -> None:
    if not good:
        raise InputError(
            f"its card's {what} is {printable(repr(value), 80)}, expected {wanted}; run one version of warmfed everywhere"
        )


@message("wire.Models")
class Models:
    """The last message to a site, and the global model: what it takes to measure, or to finish."""

    down: Message
    model: Tensors | None


@message("wire.Measures")
class EvaluateReply:
    """A site's metrics, by view/split/name."""

    metrics: Mapping[str, float]


@message("wire.Kept")
class FinishReply:
    """Digest of the personal model that the site keeps; empty: it has none."""

    personal: str


def opened(data: bytes, asked: Request, site: str | None, body: type, limit: int = 0) -> Any:
    """The answer of a site to `asked`, with a body of this class; site None: whoever it is.

    Raises:
        InputError: too large, damaged, made for another run, step or site, a refusal, or of another kind.
    """
    if limit and len(data) > limit:
        raise InputError(f"its answer has {len(data):,} bytes, at most {limit:,} are taken")
    answer = decode(data, Answer, "its answer")
    for field in ("run", "step", "stage", "number"):
        if getattr(answer, field) != getattr(asked, field):
            raise InputError(
                f"its answer is for {field} {printable(repr(getattr(answer, field)), 80)}, "
                f"expected {getattr(asked, field)!r} (a replay?)"
            )
    if site is not None and answer.site != site:
        raise InputError(f"its answer is signed by site {printable(repr(answer.site), 80)}, expected {site!r}")
    if not 0 <= answer.seconds <= _SECONDS:
        raise InputError(f"it worked for {answer.seconds} seconds, expected 0 to {_SECONDS}")
    if isinstance(answer.body, Refusal):
        raise InputError(f"it refused: {printable(answer.body.reason)}")
    if not isinstance(answer.body, body):
        raise InputError(f"its answer is of kind {type(answer.body).__name__}, expected {body.__name__}")
    return answer


def nest(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """{"global/test": {"accuracy": 1.0}} of {"global/test/accuracy": 1.0}."""
    views: dict[str, dict[str, float]] = {}
    for path, value in metrics.items():
        view, _, name = path.rpartition("/")
        views.setdefault(view, {})[name] = value
    return views
