"""Answers that no honest site gives, made of those that one does, and what a server makes of them.

`corpus` plays every algorithm once and keeps each answer with the server's state before it. `mutated` changes an answer's
bytes, its header or its content. A case takes it through the transport, the border and the stage's server function.
"""

import dataclasses
import json
import math
import random
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import tomli_w
import torch
import toy

from warmfed.algorithms import ALGORITHMS
from warmfed.core import Failure, Reply, Round, ServerContext, Stage
from warmfed.core.admission import AdmissionPolicy
from warmfed.core.messages import KINDS, Message, decode, encode, kind, tensors_of
from warmfed.core.rng import stream
from warmfed.core.tensors import finite
from warmfed.deploy.site import roster
from warmfed.transports.in_process import InProcess
from warmfed.transports.protocol import EVALUATE, HELLO, Answer, EvaluateReply, Request, SiteInfo, check_site_info, opened
from warmfed.transports.remote import Remote
from warmfed.utils.errors import InputError

RUN, BORDER, SITE = "0" * 16, AdmissionPolicy(min_sites=3), "b"
ROWS = {site: {split: len(table["label"]) for split, table in tables.items()} for site, tables in toy.SITES.items()}
CONFIG = tomli_w.dumps({})


class BrokenError(AssertionError):
    """A reply had a forbidden effect."""


@dataclass(frozen=True)
class Case:
    """An honest reply of site b, and the server function that processes it."""

    name: str
    """Algorithm/stage, or what is asked beside stages."""
    data: bytes
    take: Callable[[bytes], str]
    """take(bytes) is why the answer is refused (empty: it is taken); raises `BrokenError`."""


@dataclass
class Bytes:
    """A `Channel` that delivers one reply."""

    data: bytes

    def ask(self, action: str, letters: Mapping[str, bytes], seconds: float) -> Iterator[tuple[str, bytes | Failure]]:
        for site in letters:
            yield site, self.data


def remote(data: bytes) -> Remote:
    return Remote(Bytes(data), tuple(toy.SITES), RUN, CONFIG, BORDER)


def answer(stage: str, step: int, number: int, body: Message) -> bytes:
    return encode(Answer(RUN, SITE, stage, step, number, 0.1, body))


def corpus(names: tuple[str, ...] = tuple(ALGORITHMS)) -> list[Case]:
    """An honest answer for each stage of each algorithm that has a client function, and to what is asked beside."""
    late = of_algorithm("warmfed", late=True) if "warmfed" in names else []
    return [*beside(), *late, *(case for name in names for case in of_algorithm(name))]


def of_algorithm(name: str, *, late: bool = False) -> list[Case]:
    """The cases of one algorithm; late: site b is away in its first stage, and the only case is its first round of training."""
    algorithm, task, cases = toy.quick(name), toy.task_of(name), []
    transport = InProcess(toy.workers(algorithm, task=task))
    central = replace(toy.central(task=task), rows=ROWS)
    server, plan, seen = algorithm.init(replace(central, rng=stream(0, "init"))), algorithm.stages(), set[str]()
    for step, stage in enumerate(plan):
        down = {site: (stage.broadcast or algorithm.broadcast)(server, site) for site in transport.sites if stage.client}
        replies = {site: reply for site, reply, _ in transport.send(step, stage.name, 0, down)}
        if late and step == 0:
            del replies[SITE]
        elif late and stage.name == "train":
            return [_case(f"{name}-late", step, stage, server, down, replies, central, [])]
        elif stage.client and (stage.name not in seen or stage.name == "train"):  # the last round of training
            cases = [case for case in cases if case.name != f"{name}/{stage.name}"]
            tail = []
            for later in plan[step + 1 :]:
                if later.client is not None:
                    break
                tail.append(later)
            cases.append(_case(name, step, stage, server, down, replies, central, tail))
            seen.add(stage.name)
        server, _ = stage.server(server, replies, replace(central, rng=stream(0, step)))
    return cases


def _case(
    name: str,
    step: int,
    stage: Stage,
    server: Message,
    down: Mapping[str, Message],
    replies: Mapping[str, Reply],
    central: ServerContext,
    tail: list[Stage],
) -> Case:
    others = {site: reply for site, reply in replies.items() if site != SITE}
    sent = {SITE: down[SITE]}

    def take(data: bytes) -> str:
        taken: dict[str, Reply | Failure] = dict(others)
        for site, found, _ in remote(data).send(step, stage.name, 0, sent):
            taken[site] = BORDER.admit(found, site, down[site], stage, central)
        good, absent = BORDER.exclude_outliers(taken, down, stage)
        if absent.keys() - {SITE}:
            raise BrokenError(f"honest sites are left out: {absent}")
        if absent:
            if not absent[SITE].isprintable() or len(absent[SITE]) > 300:
                raise BrokenError(f"not a printable line: {absent[SITE]!r}")
            return absent[SITE]
        state, metrics = stage.server(server, good, replace(central, rng=stream(0, step)))
        for later in tail[:1]:
            state, metrics = later.server(state, {}, replace(central, rng=stream(0, step + 1)))
        wrong = [path for path, tensor in tensors_of(state).items() if not finite(tensor)]
        if wrong:
            raise BrokenError(f"the server's state is not finite: {wrong[:3]}")
        if encode(decode(encode(state))) != encode(state):
            raise BrokenError("the server's state cannot be decoded")
        recorded({site: reply.metrics for site, reply in good.items()}, metrics, {})
        return ""

    return Case(f"{name}/{stage.name}", answer(stage.name, step, 0, replace(replies[SITE], state=None)), take)


def recorded(train: Any, aggregate: Any, evaluation: Any) -> None:
    """The record of these must be JSON."""
    done = Round(0, "train", 0, None, ("a",), train, aggregate, evaluation, (), 0.0)
    json.dumps(done.results(), allow_nan=False)


def beside() -> list[Case]:
    """Return the replies to hello and evaluate."""
    algorithm = toy.quick("fedavg")
    worker, central = toy.workers(algorithm)[SITE], replace(toy.central(), rows=ROWS)
    server = algorithm.init(replace(central, rng=stream(0, "init")))
    found = {site: toy.workers(algorithm)[site].evaluate(server, None, server.model) for site in toy.SITES}
    flat = {f"{view}/{name}": value for view, values in found[SITE].items() for name, value in values.items()}
    rows = {split: float(count) for split, count in ROWS[SITE].items()}
    card = SiteInfo("0", "toy", ("0", "1", "2"), "a {}", (3.0, 8.0, 8.0), rows, ("0" * 64,) * 3, "", "")
    hello = Request(RUN, "", CONFIG, HELLO, 0, 0, None)
    assert worker.site == SITE

    def measure(data: bytes) -> str:
        views = {**found, **remote(data).evaluate({SITE: server}, server.model)}
        taken, absent = BORDER.admit_metrics(views, server.model, central)
        if absent.keys() - {SITE}:
            raise BrokenError(f"honest sites are left out: {absent}")
        recorded({}, {}, taken)
        return absent.get(SITE, "")

    def introduce(data: bytes) -> str:
        try:
            shown = opened(data, hello, None, SiteInfo)
            check_site_info(shown.body)
            roster({shown.site: shown.body}, (shown.site,))
        except InputError as error:
            return str(error)
        return ""

    return [
        Case("evaluate", answer(EVALUATE, 0, 0, EvaluateReply(flat)), measure),
        Case("hello", answer(HELLO, 0, 0, card), introduce),
    ]


# how an answer is changed

RAW = (
    *("NaN", "Infinity", "-Infinity", "1e308", "-1e308", "1e400", "1" + "0" * 400, "1" * 5000),
    *("-1", "0", "0.5", "null", "true", '""', "[]", "{}", "[" * 2000 + "]" * 2000, '{"kind":' * 300 + "null" + "}" * 300),
    *('"' + "x" * 5000 + '"', '"\\u0000\\u001b[2J\\ud800"'),
)
FACTORS = (1000.0, -10.0, 1e30, 1e38, float("nan"), float("inf"), 0.0)
NUMBERS = (float("nan"), float("inf"), -1.0, 0.0, 0.5, 1e9, 1e308, -1e308, 3e38)
INTEGERS = (-1, 0, 10**9, 2**62, 10**18)
_MARK = "@@here@@"


def mutated(data: bytes, bodies: list[Message], rng: random.Random) -> bytes:
    """Return a mutated reply: flipped bits, cut bytes, other values in the header, another kind, or other content."""
    return rng.choice((_flipped, _cut, _header, _header, _key, _other, _content, _content, _content))(data, bodies, rng)


def _flipped(data: bytes, bodies: list[Message], rng: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def _cut(data: bytes, bodies: list[Message], rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))] + rng.randbytes(rng.choice((0, 0, 8, 100)))


def _split(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + size])
    return outer, json.loads(outer["__metadata__"]["warmfed"]), data[8 + size :]


def _joined(outer: dict[str, Any], inner: str, body: bytes) -> bytes:
    outer["__metadata__"]["warmfed"] = inner
    head = json.dumps(outer).encode()
    return len(head).to_bytes(8, "little") + head + body


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


def _header(data: bytes, bodies: list[Message], rng: random.Random) -> bytes:
    outer, inner, body = _split(data)
    where, key = rng.choice(_places(inner))
    where[key] = _MARK
    return _joined(
        outer, json.dumps(inner).replace(f'"{_MARK}"', rng.choice((*RAW, json.dumps(rng.choice(sorted(KINDS)))))), body
    )


def _key(data: bytes, bodies: list[Message], rng: random.Random) -> bytes:
    outer, inner, body = _split(data)
    where, key = rng.choice([place for place in _places(inner) if isinstance(place[0], dict)])
    value = where[key]
    if rng.random() < 0.6:
        del where[key]
    if rng.random() < 0.6:
        where[rng.choice(("x" * 3000, "\x1b[31m", "global/test/count", "loss", "/", "../..", ""))] = value
    return _joined(outer, json.dumps(inner), body)


def _other(data: bytes, bodies: list[Message], rng: random.Random) -> bytes:
    found, other = decode(data, Answer), rng.choice(bodies)
    if isinstance(found.body, Reply) and rng.random() < 0.8:
        return encode(replace(found, body=replace(found.body, message=rng.choice((other, None, found.body)))))
    return encode(replace(found, body=rng.choice((other, None))))


def _content(data: bytes, bodies: list[Message], rng: random.Random) -> bytes:
    found = decode(data, Answer)
    for _ in range(rng.randint(1, 2)):
        if isinstance(found.body, Reply) and rng.random() < 0.7:
            found = replace(found, body=replace(found.body, message=_changed(found.body.message, rng)))
        elif isinstance(found.body, Reply):
            metrics = {**found.body.metrics, rng.choice(("loss", "personal_strength", "x" * 101, "\x00")): rng.choice(NUMBERS)}
            weight = rng.choice((found.body.weight, *NUMBERS))
            found = replace(found, body=replace(found.body, metrics=metrics, weight=weight))
        else:
            found = replace(found, body=_changed(found.body, rng))
    return encode(found)


def _changed(message: Message, rng: random.Random) -> Message:
    fields = dataclasses.fields(message)
    if not fields:
        return message
    name = rng.choice(fields).name
    return replace(message, **{name: _value(getattr(message, name), rng)})


def _value(value: Any, rng: random.Random) -> Any:
    match value:
        case torch.Tensor():
            return _tensor(value, rng)
        case bool() | None:
            return value
        case int():
            return rng.choice(INTEGERS)
        case float():
            return rng.choice(NUMBERS)
        case str():
            return rng.choice(("", "x" * 5000, "\x1b[2J\n", "../../etc"))
        case tuple():
            items = list(value)
            if items and rng.random() < 0.5:
                items[rng.randrange(len(items))] = _value(items[0], rng)
            return tuple(rng.choice((items, items * 2, items[1:], items * 3000 if len(items) < 20 else items)))
        case dict() if value:
            key = rng.choice(list(value))
            rest = {other: value[other] for other in value if other != key}
            return rng.choice(({**value, key: _value(value[key], rng)},) * 4 + (rest, {**value, "more": value[key]}))
    return value


def _tensor(value: torch.Tensor, rng: random.Random) -> torch.Tensor:
    match rng.randrange(6):
        case 0:
            return value.flatten()[:1]
        case 1:
            return value.to(rng.choice((torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8)))
        case 2:
            return value.unsqueeze(0)
        case 3 if value.numel() and value.is_floating_point():
            spoiled = value.clone()
            spoiled.view(-1)[rng.randrange(value.numel())] = rng.choice(FACTORS)
            return spoiled
        case _ if value.is_floating_point():
            return value * rng.choice(FACTORS)
    return value.clone().fill_(rng.choice((0, 1, 127)))


def attack(
    cases: list[Case], turns: range, seed: int, seconds: float = 2.0, megabytes: float = 200.0
) -> dict[str, dict[str, int]]:
    """Feed changed answers, in turn of each case: those of these numbers.

    Returns:
        By case, how many were refused and how many taken.

    Raises:
        BrokenError: an answer raised an error, took too long or too much memory, or left a state that cannot be used.
    """
    bodies = [body for case in cases for body in _bodies(decode(case.data, Answer).body)]
    counts = {case.name: {"refused": 0, "taken": 0} for case in cases}
    for turn in turns:
        case = cases[turn % len(cases)]
        data = mutated(case.data, bodies, random.Random(f"{seed}/{turn}"))
        began, held = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            reason = case.take(data)
        except Exception as error:
            raise BrokenError(f"{case.name}, seed {seed}, turn {turn}: {type(error).__name__}: {error}") from error
        spent, more = time.process_time() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1024
        if spent > seconds or more > megabytes:
            raise BrokenError(f"{case.name}, seed {seed}, turn {turn}: {spent:.1f} s, {more:.0f} MB")
        counts[case.name]["refused" if reason else "taken"] += 1
    return counts


def _bodies(body: Message) -> list[Message]:
    return [body, body.message] if isinstance(body, Reply) else [body]


def share_of(counts: Mapping[str, Mapping[str, int]]) -> float:
    """Return the share of mutated replies that were rejected."""
    return math.fsum(c["refused"] for c in counts.values()) / max(1, sum(sum(c.values()) for c in counts.values()))


def kinds_of(cases: list[Case]) -> list[str]:
    """Return the kinds of message of the cases."""
    return sorted({kind(type(body)) for case in cases for body in _bodies(decode(case.data, Answer).body)})
