"""Admission policy: validates client replies before aggregation, for every transport."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from statistics import median
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..utils.errors import InputError
from .contract import Reply, ServerContext, ServerState, Stage
from .messages import Message, kind, tensors_of
from .records import LARGEST, Failure, Metrics, cap_weights
from .tensors import Tensors, finite, layout_mismatch

T = TypeVar("T")
_METRICS, _NAME, _ROWS = 64, 100, 10**12
_FAR = 1e15
"""Upper bound of a change's root mean square; squares and sums of such values are finite in float32."""


@dataclass(frozen=True)
class AdmissionPolicy:
    """Settings of `[server]`: limits on client replies, and the number of replies that a stage needs."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "least": "min_sites",
        "deadline": "stage_timeout",
        "norm": "max_update_norm",
        "bytes": "max_reply_bytes",
        "far": "max_update_ratio",
        "rows": "max_rows",
        "share": "max_weight_share",
    }

    stage_timeout: float = 3600.0
    """Time limit of a stage, and of its evaluation, in seconds; remote sites only. Default 3600; greater than 0."""
    min_sites: int = 0
    """Sites whose reply a stage needs; with fewer, the run stops at its last checkpoint. Default 0: all sites of the stage."""
    max_update_norm: float = 0.0
    """Largest L2 norm of a reply's change (`Stage.change`). Default 0: any finite norm."""
    max_update_ratio: float = 8.0
    """Largest change of a reply, as a multiple of the median change of the other sites. Default 8; 0: no limit.

    A larger change is excluded if it also exceeds a quarter of the size of the sent tensors. The limit grows in proportion
    to a site's rows above the median, up to half of all rows. It applies from three replies on."""
    max_reply_bytes: int = 0
    """Largest reply in bytes; remote sites only. Default 0: the limit of the transport."""
    max_rows: int = 0
    """Largest number of rows that a site may declare, over all splits. Default 0: no limit."""
    max_weight_share: float = 1.0
    """Largest share of the total weight of one site; heavier sites are reduced to it. Default 1.0: no limit."""

    sites: tuple[str, ...] = ()
    """Names of the participating sites; remote sites only. Default empty: the sites that are connected at the start.

    A run starts when all of them are connected, or after `stage_timeout` with `min_sites` of them."""

    def __post_init__(self) -> None:
        sizes = (self.max_update_norm, self.max_update_ratio, self.min_sites, self.max_reply_bytes, self.max_rows)
        if not (0 < self.stage_timeout < inf and all(0 <= size < inf for size in sizes) and 0 < self.max_weight_share <= 1):
            raise InputError(
                "[server] holds a value out of range: expected finite values, stage_timeout above 0, max_weight_share above 0 "
                "and at most 1, max_update_norm, max_update_ratio, min_sites, max_reply_bytes and max_rows at least 0; "
                "correct [server]"
            )

    def needed(self, requested: int) -> int:
        """Return how many of the requested sites must reply."""
        return min(self.min_sites, requested) if self.min_sites else requested

    def admit(
        self, answer: Reply[Message] | Failure, site: str, sent: Message, stage: Stage, ctx: ServerContext
    ) -> Reply[Message] | Failure:
        """Return the reply if it is valid, else a `Failure` with the reason.

        A valid reply satisfies these conditions:

        - Its kind is one of `Stage.replies`, or the kind that was sent.
        - If it has the kind that was sent, its tensors have the names, shapes and types that were sent.
        - Every floating-point tensor is finite.
        - Its weight is at most the number of rows that the site declares.
        - Its metrics are few and have short printable names.
        - It passes `Stage.check` and `max_update_norm`.
        """
        if isinstance(answer, Failure):
            return answer
        return catch_failure(partial(self._admitted, answer, site, sent, stage, ctx))

    def _admitted(
        self, reply: Reply[Message], site: str, sent_message: Message, stage: Stage, ctx: ServerContext
    ) -> Reply[Message]:
        rows = ctx.rows.get(site, {})
        if self.max_rows and sum(rows.values()) > self.max_rows:
            raise InputError(f"it declares {sum(rows.values())} rows, expected at most {self.max_rows} (server.max_rows)")
        most = rows.get(stage.weight_split, _ROWS)
        if not 1 <= reply.weight <= most:
            raise InputError(
                f"its weight is {reply.weight}, expected 1 to the {most} {stage.weight_split} rows that it declares"
            )
        _check_names(reply.metrics)
        kinds = stage.replies or (type(sent_message),)
        if type(reply.message) not in kinds:
            wanted = " or ".join(kind(each) for each in kinds)
            raise InputError(f"its message is of kind {kind(type(reply.message))}, expected {wanted}")
        came, sent = tensors_of(reply.message), tensors_of(sent_message)
        if wrong := layout_mismatch(came, sent) if sent and type(reply.message) is type(sent_message) else "":
            raise InputError(wrong)
        for name, tensor in sorted(came.items()):
            if not finite(tensor):
                raise InputError(f"tensor {name!r} is not finite")
        if stage.check is not None:
            stage.check(reply, site, ctx)
        if self.max_update_norm:
            norm = math.hypot(
                *(size * math.sqrt(count) for size, count in _changes(reply.message, sent_message, stage).values())
            )
            if norm > self.max_update_norm:
                raise InputError(
                    f"its norm is {norm:.4g}, expected at most {self.max_update_norm:.4g} (server.max_update_norm)"
                )
        return reply

    def exclude_outliers(
        self, answers: Mapping[str, Reply[Message] | Failure], sent: Mapping[str, Message], stage: Stage
    ) -> tuple[dict[str, Reply[Message]], dict[str, str]]:
        """Return the replies for the stage's server function, and the reasons of the excluded sites; both by site.

        Replies with a change far larger than the other sites' are excluded. Weights are capped at `max_weight_share`.
        """
        answers = dict(sorted(answers.items()))
        replies = {site: answer for site, answer in answers.items() if isinstance(answer, Reply)}
        changes = {site: _changes(reply.message, sent[site], stage) for site, reply in replies.items()}
        weights = cap_weights({site: reply.weight for site, reply in replies.items()}, 0.5)  # a site may declare too many rows
        for site, fields in changes.items():
            if wrong := next(filter(None, (self._outlier(site, field, changes, weights, sent[site]) for field in fields)), ""):
                answers[site] = Failure(wrong)
                del replies[site]
        weights = cap_weights({site: reply.weight for site, reply in replies.items()}, self.max_weight_share)
        replies = {
            site: reply if reply.weight == weights[site] else replace(reply, weight=weights[site])
            for site, reply in replies.items()
        }
        return replies, {site: answer.reason for site, answer in answers.items() if isinstance(answer, Failure)}

    def _outlier(self, site: str, field: str, changes: Mapping[str, Any], weights: Mapping[str, float], sent: Message) -> str:
        """Return why the change of one field of a site's reply is too large; empty if it is not."""
        size = changes[site][field][0]
        if not size <= _FAR:
            return f"the change of its {field!r} has a root mean square of {size:.4g}, expected at most {_FAR:.0e}"
        others = [other for other in changes if other != site and field in changes[other]]
        if not self.max_update_ratio or len(others) < 2:
            return ""
        middle, rows = median(changes[other][field][0] for other in others), median(weights[other] for other in others)
        times = self.max_update_ratio * max(1.0, weights[site] / rows)
        if not 0 < middle * times < size or size <= _size(_by_field(tensors_of(sent)).get(field, []))[0] / 4:
            return ""
        found = f"the change of its {field!r} is {size / middle:.4g} times the others' median"
        return f"{found}, expected at most {times:.4g} (server.max_update_ratio)"

    def admit_metrics(
        self, answers: Mapping[str, Mapping[str, Metrics] | Failure], model: Tensors | None, ctx: ServerContext
    ) -> tuple[dict[str, Mapping[str, Metrics]], dict[str, str]]:
        """Return the valid metrics of the sites, and the reasons of the other sites; both by site.

        Args:
            answers: by site, metrics by "view/split", as `Transport.evaluate` returns them.
            model: the evaluated global model, or None.
        """
        found: dict[str, Mapping[str, Metrics]] = {}
        absent: dict[str, str] = {}
        for site, views in answers.items():
            rows = ctx.rows.get(site, {})
            taken = (
                views if isinstance(views, Failure) else catch_failure(partial(_measures, views, model is not None, rows, ctx))
            )
            if isinstance(taken, Failure):
                absent[site] = f"its models are not evaluated: {taken.reason}"
            else:
                found[site] = taken
        return found, absent

    def check_state(self, server: ServerState, stage: str) -> None:
        """Raise `InputError` if the server's new state holds a number that is not finite."""
        if wrong := next((name for name, tensor in sorted(tensors_of(server).items()) if not finite(tensor)), ""):
            raise InputError(
                f"after stage {stage}, tensor {wrong!r} of the server is not finite: training diverged; "
                "set a lower learning rate, or limit the sites' updates with server.max_update_norm"
            )


DEFAULT_ADMISSION = AdmissionPolicy()
"""Default policy: every site of a stage must reply, and every tensor must be finite."""


def catch_failure(take: Callable[[], T]) -> T | Failure:
    """Return the result of `take()`, or a `Failure` with the reason if it raises.

    Any exception that a reply causes fails its site, not the run. No other function catches every exception.
    """
    try:
        return take()
    except InputError as error:
        return Failure(str(error))
    except Exception as error:
        return Failure(f"its reply cannot be used ({type(error).__name__}: {error})")


def _check_names(metrics: Mapping[str, Any]) -> None:
    """Raise `InputError` if there are too many metrics, or a name is too long or not printable."""
    if len(metrics) > _METRICS or not all(len(name) <= _NAME and name.isprintable() for name in metrics):
        raise InputError(f"it has {len(metrics)} metrics; expected at most {_METRICS}, each of {_NAME} printable characters")


_VIEWS = {f"{model}/{split}" for model in ("global", "personal") for split in ("validation", "test")}


def _measures(views: Mapping[str, Metrics], shared: bool, rows: Mapping[str, int], ctx: ServerContext) -> Mapping[str, Metrics]:
    """Return `views`, metrics by "view/split"; raise `InputError` if a view, a metric or a count is not as expected."""
    models = {view.partition("/")[0] for view in views} | ({"global"} if shared else set())
    wanted = {f"{model}/{split}" for model in models for split in ("validation", "test") if rows.get(split)}
    if views.keys() - _VIEWS or wanted - views.keys():
        raise InputError(f"it evaluated {sorted(views)[:8]}, expected {sorted(wanted)}")
    for view, metrics in views.items():
        _check_names(metrics)
        value, count = metrics.get(ctx.task.measure, inf), metrics.get("count", inf)
        most = 100.0 if ctx.task.measure == "accuracy" else LARGEST
        split = view.partition("/")[2]
        if not abs(value) <= most or (value < 0 and most == 100):
            raise InputError(f"{ctx.task.measure} of {view} is {value}, expected a finite number")
        if not 1 <= count <= _ROWS or count != rows.get(split, count) or count != int(count):
            raise InputError(f"count of {view} is {count}, expected the {rows.get(split, 'number of')} rows that it declares")
    return views


def _changes(message: Message, sent_message: Message, stage: Stage) -> dict[str, tuple[float, int]]:
    """Return, by field of a reply's message, the root mean square of its change and the count of its numbers."""
    if stage.change is not None:
        moved: Tensors = stage.change(message, sent_message)
    else:
        came, sent = tensors_of(message), tensors_of(sent_message)
        both = [name for name in came if name in sent and sent[name].shape == came[name].shape]
        floating = [name for name in both if came[name].is_floating_point()]
        moved = {name: came[name].sub(sent[name]) for name in floating} if both else came
    return {field: _size(parts) for field, parts in _by_field(moved).items()}


def _by_field(tensors: Tensors) -> dict[str, list[Tensor]]:
    fields: dict[str, list[Tensor]] = {}
    for name, value in sorted(tensors.items()):
        if value.is_floating_point() and value.numel():
            fields.setdefault(name.partition("/")[0], []).append(value)
    return fields


def _size(parts: list[Tensor]) -> tuple[float, int]:
    count = sum(part.numel() for part in parts)
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64).item() for part in parts]
    return math.hypot(*norms) / math.sqrt(max(count, 1)), count
