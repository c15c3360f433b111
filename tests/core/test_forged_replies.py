"""Forged replies over a loop-back Flower grid, and weights, counts and updates that no honest site sends."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import toy
from faulty import Faulty

pytest.importorskip("flwr")
import fuzz
from consortium import SETTINGS, SITES, Consortium, settings, spoil, tampered
from flwr.app import Message

from warmfed.algorithms.shared.base import Model
from warmfed.config import parse
from warmfed.core import Empty, Failure, Reply, Round, cap_weights
from warmfed.core.admission import AdmissionPolicy
from warmfed.core.tensors import mean, sub
from warmfed.run import run
from warmfed.runs.prepare import prepare
from warmfed.transports.flower import unpack
from warmfed.transports.in_process import InProcess
from warmfed.transports.protocol import SiteInfo, check_site_info
from warmfed.utils.errors import InputError

NAN, SETTING = float("nan"), SETTINGS | {"algorithm": {"name": "fedavg", "rounds": 2, "local": {"epochs": 1}}}
Tamper = Callable[[Message, Message], Message | None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.arrays(tmp_path_factory.mktemp("data") / "toy.npz", SITES)


def raw(*path: str, text: str) -> Tamper:
    """Return a reply with `text` at this position of its header."""

    def change(message: Message, reply: Message) -> Message:
        outer, inner, body = fuzz._split(unpack(reply.content))
        place = inner["fields"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = "@@"
        return tampered(reply, fuzz._joined(outer, json.dumps(inner).replace('"@@"', text), body))

    return change


def body(**changes: Any) -> Tamper:
    return spoil(lambda answer: replace(answer, body=replace(answer.body, **changes)))


def metric(name: str, value: float) -> Tamper:
    return spoil(lambda a: replace(a, body=replace(a.body, metrics={**a.body.metrics, name: value})))


def models(change: Callable[[Any], Any]) -> Tamper:
    return spoil(lambda a: replace(a, body=replace(a.body, message=Model(change(a.body.message.model)))))


TRAIN: dict[str, tuple[Tamper, str]] = {
    "weight 1e9": (body(weight=1e9), "its weight is 1000000000.0, expected 1 to the 12 train rows"),
    "weight 0": (body(weight=0.0), "its weight is 0.0"),
    "weight of 400 digits": (raw("body", "fields", "weight", text="1" + "0" * 400), "does not match its declaration"),
    "no message": (body(message=None), "does not match its declaration (it is empty)"),
    "another kind": (body(message=Empty()), "is of kind core.Nothing, expected averaging.Model"),
    "many metrics": (body(metrics={str(i): 0.0 for i in range(65)}), "it has 65 metrics"),
    "a metric's name": (metric("\x1b[2J", 0.0), "printable characters"),
    "seconds": (spoil(lambda a: replace(a, seconds=NAN)), "it worked for nan seconds"),
    "x 1000": (models(lambda m: {n: 1000 * t for n, t in m.items()}), "times the others' median, expected at most 8"),
    "1e30": (models(lambda m: {n: 0 * t + 1e30 for n, t in m.items()}), "has a root mean square of 1e+30"),
}
MEASURED: dict[str, tuple[Tamper, str]] = {
    "accuracy NaN": (metric("global/test/accuracy", NAN), "accuracy of global/test is nan"),
    "accuracy 1e308": (metric("global/test/accuracy", 1e308), "accuracy of global/test is 1e+308"),
    "count 1e16": (metric("global/test/count", 1e16), "count of global/test is 1e+16, expected the 6 rows"),
    "no metrics": (body(metrics={}), "it evaluated []"),
    "an unknown view": (metric("ours/test/accuracy", 1.0), "it evaluated"),
    "a count of 400 digits": (
        raw("body", "fields", "metrics", "global/test/count", text="1" + "0" * 400), "does not match its declaration"
    ),
}  # fmt: skip


def served(folder: Path, data: Path, action: str, fault: Tamper) -> list[dict[str, Any]]:
    """Return the records of a run with a forged second reply of site b to this action."""
    consortium = Consortium(folder, data)
    border = SETTINGS["server"] | {"min_sites": 3, "stage_timeout": 4.0}
    consortium.config = settings(folder / "server.toml", **SETTING | {"server": border})
    seen: list[int] = []

    def tamper(node: int, message: Message, reply: Message) -> Message | None:
        if node != consortium.node("b") or message.metadata.message_type != action:
            return reply
        seen.append(node)
        return fault(message, reply) if len(seen) == 2 else reply

    consortium.serve(tamper)
    return consortium.records()


def others(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of all sites except b, and of all sites together."""
    plain = [{key: value for key, value in r.items() if key not in ("seconds", "peak_memory_mb", "absent")} for r in records]
    return [
        {key: {s: v for s, v in value.items() if s != "b"} if isinstance(value, dict) else value for key, value in r.items()}
        for r in plain
    ]


@pytest.fixture(scope="module")
def silent(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return the records of runs without replies of site b."""
    actions = ("train.train", "evaluate")
    return {action: served(tmp_path_factory.mktemp("silent"), data, action, lambda m, r: None) for action in actions}


@pytest.mark.parametrize(
    ("action", "name"), [*(("train.train", name) for name in TRAIN), *(("evaluate", name) for name in MEASURED)]
)
def test_a_forged_answer_is_as_none(action: str, name: str, tmp_path: Path, data: Path, silent: Any) -> None:
    fault, reason = {**TRAIN, **MEASURED}[name]
    records = served(tmp_path, data, action, fault)
    assert "absent" not in records[0]
    assert reason in records[1]["absent"]["b"]
    assert records[1]["absent"].keys() == {"b"}
    assert others(records) == others(silent[action])


def test_a_metric_that_is_not_a_number_is_written_as_none(tmp_path: Path, data: Path) -> None:
    records = served(tmp_path, data, "train.train", metric("personal_strength", NAN))
    assert records[1]["train"]["b"]["personal_strength"] is None
    assert (tmp_path / "run" / "report.html").exists()


ROWS, THREE = fuzz.ROWS, AdmissionPolicy(min_sites=3)


def played(
    name: str,
    faults: Any,
    border: AdmissionPolicy = THREE,
    rows: Any = ROWS,
    **changes: Any,
) -> list[Round]:
    algorithm, task = toy.quick(name, **changes), toy.task_of(name)
    central = replace(toy.central(task=task), rows=rows)
    return list(run(algorithm, central, Faulty(InProcess(toy.workers(algorithm, task=task)), faults), admission=border))


def message(**changes: Any) -> Callable[[Reply], Reply]:
    return lambda r: replace(r, message=replace(r.message, **{n: f(getattr(r.message, n)) for n, f in changes.items()}))


@pytest.mark.parametrize(
    ("name", "step", "fault", "reason"),
    [
        (
            "warmfed",
            3,
            lambda r: replace(message(counts=lambda n: (10**9, 0, 0))(r), weight=1e9),
            "expected 1 to the 15 validation rows",
        ),
        ("warmfed", 3, message(counts=lambda n: (10**9, 0, 0)), "right answers and losses"),
        ("scaffold", 0, message(control=lambda c: dict(list(c.items())[1:])), "is missing, expected float32"),
        ("fednova", 0, message(accumulated=lambda n: 1e9), "it accumulated 1000000000.0 gradients, expected at most"),
        ("fedproto", 0, message(count=lambda c: {"images": c["images"] * 2**40}), "class counts whose sum is"),
        ("fedncm", 0, message(count=lambda c: {"images": -c["images"]}), "class counts whose sum is"),
        ("fedpft", 0, message(mixture=lambda m: {**m, "spread": m["spread"] - 1e6}), "variance of its Gaussians is below 0"),
        ("fedpft", 0, message(mixture=lambda m: {**m, "mean": m["mean"] * 1e6}), "the change of its 'mixture'"),
        ("ccvr", 2, message(mixture=lambda m: {**m, "spread": -m["spread"]}), "variance of its Gaussians is below 0"),
        ("fedphd", 0, message(counts=lambda c: (1e300, *c[1:])), "class counts whose sum is"),
        ("fedddpm", 0, message(labels=lambda c: (10**400, *c[1:])), "class counts whose sum is"),
        ("feddm-quant", 0, message(plain=lambda p: {**p, "more": toy.torch.tensor(0)}), "tensor 'more'"),
        ("centralized", 0, message(train=lambda t: {**t, "label": t["label"] + 7}), "not from 0 to 2"),
        ("local", 0, lambda r: replace(r, message=Model({})), "of kind averaging.Model, expected core.Nothing"),
    ],
)
def test_a_forged_reply_leaves_its_site_out(name: str, step: int, fault: Any, reason: str) -> None:
    rounds = played(name, {(step, "b"): fault})
    assert reason in rounds[step].absent["b"]
    gone = played(name, {(step, "b"): lambda reply: Failure("it has not answered")})
    assert [r.results() | {"absent": 0, "bytes_up": 0} for r in rounds] == [
        r.results() | {"absent": 0, "bytes_up": 0} for r in gone
    ]


def scaled(factor: float) -> Callable[[Reply], Reply]:
    def change(reply: Reply) -> Reply:
        return replace(reply, message=Model({n: t * factor for n, t in reply.message.model.items()}))

    return change


def test_a_far_change_is_left_out_by_name_and_by_default() -> None:
    for fault in (scaled(1000.0), scaled(1e30)):
        found = played("fedavg", {(0, "b"): fault})
        assert "the change of its 'model' " in found[0].absent["b"]
    assert not played("fedavg", {(0, "b"): scaled(1000.0)}, AdmissionPolicy(max_update_ratio=0))[0].absent
    both = played("fedavg", {(0, "b"): scaled(1000.0), (0, "c"): scaled(-1000.0)}, AdmissionPolicy(min_sites=2))
    assert both[0].absent.keys() == {"b", "c"}
    with pytest.raises(InputError, match=r"3 of 4 sites gave a valid reply .* \(site 'b': the change of its 'model' "):
        played("fedavg", {(0, "b"): scaled(1000.0)}, AdmissionPolicy())


def test_inflated_rows_let_nobody_go_far() -> None:
    inflated = {**ROWS, "b": {split: rows * 10**6 for split, rows in ROWS["b"].items()}}

    def liar(reply: Reply) -> Reply:
        return replace(scaled(1000.0)(reply), weight=reply.weight * 10**6)

    found = played("fedavg", {(0, "b"): liar}, rows=inflated)[0]
    assert "times the others' median, expected at most 23 " in found.absent["b"]


@pytest.mark.parametrize(
    ("weights", "share", "expected"),
    [
        ((1, 2, 7), 1.0, (1, 2, 7)),
        ((1, 2, 7), 0.5, (1, 2, 3)),
        ((1, 4, 5), 0.4, (1, 2, 2)),
        ((3, 2, 9), 0.3, (2, 2, 2)),
        ((5,), 0.5, (5,)),
        ((), 0.5, ()),
    ],
)
def test_no_weight_is_more_than_its_share(weights: Any, share: float, expected: Any) -> None:
    found = cap_weights(dict(zip("abc", map(float, weights), strict=False)), share)
    assert tuple(found.values()) == pytest.approx(expected)
    assert share < 1 / max(len(weights), 1) or max(found.values(), default=0) <= share * sum(found.values()) + 1e-9


def test_share_bounds_replies_verdicts_and_the_union_of_tests() -> None:
    whole, shared = played("fedavg", {}), played("fedavg", {}, AdmissionPolicy(max_weight_share=0.25))
    replies = {}
    transport = InProcess(toy.workers(toy.quick("fedavg"), task=toy.task_of("fedavg")))
    start = toy.quick("fedavg").init(replace(toy.central(task=toy.task_of("fedavg")), rng=toy.stream(0, "init")))
    for site, reply, _ in transport.send(0, "train", 0, dict.fromkeys(transport.sites, start)):
        replies[site] = reply
    plain = mean((reply.message.model, 1.0) for _, reply in sorted(replies.items()))
    assert max(float(t.abs().max()) for t in sub(shared[0].server.model, plain).values()) < 1e-6
    assert not toy.same(whole[0].server.model, shared[0].server.model)
    tests = {s: v["test"] for s, v in shared[0].results()["global"].items()}
    assert shared[0].results()["union"]["global"]["accuracy"] == pytest.approx(sum(t["accuracy"] for t in tests.values()) / 4)


def test_a_verdict_weighs_no_more_than_its_share() -> None:
    def few(reply: Reply) -> Reply:
        right = dict.fromkeys(reply.message.right, toy.torch.ones(3, dtype=toy.torch.float64))
        return replace(reply, weight=3.0, message=replace(reply.message, counts=(1, 1, 1), right=right))

    faults = {(3, site): few for site in "bcd"}  # three sites of three right answers of three, and one of 15 images
    alone, shared = (
        played("warmfed", faults, AdmissionPolicy(min_sites=3, max_weight_share=share))[3] for share in (1.0, 0.25)
    )
    # (9 + r) of 24 right answers, and with the share (9 + r/5) of 12, for r of 15 at the first site
    first = 24 * alone.aggregate["validation_before"] / 100 - 9
    assert first < 15
    assert shared.aggregate["validation_before"] == pytest.approx(100 * (9 + first / 5) / 12)


def test_share_names_the_run_and_other_bounds_do_not(tmp_path: Path) -> None:
    data = tiny.arrays(tmp_path / "toy.npz")
    names = [
        prepare(tiny.config(data, **border)).fingerprint
        for border in ({}, {"server__max_update_ratio": 9.0}, {"server__max_weight_share": 0.5})
    ]
    assert names[0] == names[1] != names[2]
    with pytest.raises(InputError, match="max_weight_share above 0 and at most 1"):
        parse(None, {"server.max_weight_share": 0.0})


CARD = SiteInfo(
    "0", "toy", ("0", "1"), "a {}", (3.0, 8.0, 8.0), {"train": 2.0, "validation": 1.0, "test": 1.0}, ("0" * 64,) * 3, "", ""
)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rows": {**CARD.rows, "train": NAN}}, "rows"),
        ({"rows": {**CARD.rows, "train": 1.5}}, "rows"),
        ({"rows": {**CARD.rows, "train": -1.0}}, "rows"),
        ({"rows": {**CARD.rows, "train": 1e300}}, "rows"),
        ({"rows": {"train": 2.0}}, "rows"),
        ({"rows": {**CARD.rows, "train": 99.0}}, "number of rows is 101, expected at most 100"),
        ({"digests": ("0" * 64,)}, "digests"),
        ({"digests": ("x" * 64,) * 3}, "digests"),
        ({"shape": (3.0, 8.0)}, "shape"),
        ({"shape": (3.0, 8.0, 65_536.0)}, "shape"),
        ({"shape": (3.0, 8.0, NAN)}, "shape"),
        ({"classes": ("0", "0")}, "number of classes"),
        ({"classes": ("0", "1\x1b[2J")}, "class 1"),
        ({"classes": tuple(map(str, range(10_001)))}, "number of classes"),
        ({"template": "x" * 1001}, "template"),
        ({"version": "\n"}, "version"),
    ],
)
def test_a_card_holds_what_a_card_may_hold(changes: dict[str, Any], reason: str) -> None:
    check_site_info(CARD, 100)
    with pytest.raises(InputError, match=reason) as caught:
        check_site_info(replace(CARD, **changes), 100)
    assert str(caught.value).isprintable()


def test_a_bad_card_is_refused_and_the_run_goes_on(tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    consortium = Consortium(tmp_path, data)
    border = SETTINGS["server"] | {"min_sites": 3, "stage_timeout": 10.0}
    consortium.config = settings(tmp_path / "server.toml", **SETTING | {"server": border})

    def tamper(node: int, message: Message, reply: Message) -> Message | None:
        bad = node == consortium.node("b") and message.metadata.message_type == "query.hello"
        return raw("body", "fields", "rows", "train", text="NaN")(message, reply) if bad else reply

    consortium.serve(tamper)
    assert [sorted(r["train"]) for r in consortium.records()] == [["a", "c", "d"]] * 2
    assert "its rows is" in caplog.text
