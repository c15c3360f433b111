"""What crosses between a server and its sites where they are on different machines, whatever carries the bytes.

A request and its answer are messages like all others: `messages.encode` makes their bytes, `messages.decode` takes
nothing on trust. An answer names run, site, step and stage; one that was made for anything else is refused.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..messages import Message, decode, message
from ..tensors import Tensors

HELLO, EVALUATE, FINISH, REFUSED = "hello", "evaluate", "finish", "refused"
"""What is asked beside the algorithm's own stages."""


@message
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
    body: Message


@message
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


@message
class Refusal:
    """The body of an answer that is none: why."""

    reason: str


@message
class Card:
    """A site presents itself: what must be equal everywhere, and its tables' rows and digests."""

    version: str
    federation: str
    classes: tuple[str, ...]
    template: str
    shape: tuple[float, ...]
    rows: Mapping[str, float]
    digests: tuple[str, ...]
    """SHA-256 of the tables in the order of `data.SPLITS`."""
    base: str
    start: str


@message
class Models:
    """The last message to a site, and the global model: what it takes to measure, or to finish."""

    down: Message
    model: Tensors | None


@message
class Measures:
    """A site's metrics, by view/split/name."""

    metrics: Mapping[str, float]


@message
class Kept:
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
                f"its answer is for {field} {getattr(answer, field)!r}, expected {getattr(asked, field)!r} (a replay?)"
            )
    if site is not None and answer.site != site:
        raise InputError(f"its answer is signed by site {answer.site!r}, expected {site!r}")
    if isinstance(answer.body, Refusal):
        raise InputError(f"it refused: {answer.body.reason}")
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
