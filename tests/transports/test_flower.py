"""A run over Flower on a loop-back Grid: the same bytes as in process, and rejection of everything except replies."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tomli_w
import torch

pytest.importorskip("flwr")
from consortium import OPEN, SETTINGS, SITES, Consortium, settings, spoil, tampered
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from warmfed.algorithms import ALGORITHMS
from warmfed.algorithms.shared.base import Model
from warmfed.config import parse
from warmfed.core.messages import decode, digest, encode
from warmfed.deploy.site import answer
from warmfed.runs.execute import execute
from warmfed.runs.folder import read_summary
from warmfed.runs.predict import predict
from warmfed.transports.flower import pack, unpack
from warmfed.transports.protocol import Answer, Request
from warmfed.utils.errors import InputError
from warmfed.utils.files import read_lines


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.arrays(tmp_path_factory.mktemp("data") / "toy.npz", SITES)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of the run in process."""
    folder = tmp_path_factory.mktemp("runs")
    return execute(parse(settings(folder / "here.toml", data={"source": str(data)})), folder / "here")


@pytest.fixture
def consortium(tmp_path: Path, data: Path) -> Consortium:
    return Consortium(tmp_path, data)


def same(found: dict[str, Any], whole: dict[str, Any]) -> None:
    for key in ("history_sha256", "models_sha256", "data_sha256"):
        assert found[key] == whole[key]


def test_a_run_over_flower_is_the_run_in_process(consortium: Consortium, whole: dict[str, Any], tmp_path: Path) -> None:
    same(consortium.serve(), whole)
    assert (tmp_path / "run" / "report.html").exists()
    kept = next((tmp_path / "site-b" / "work" / "runs").iterdir())
    assert read_summary(kept)["models_sha256"]["personal/b"] == whole["models_sha256"]["personal/b"]
    with pytest.raises(InputError, match="is not a file"):
        predict(kept, [tmp_path / "nothing.png"], "b")


def test_an_answer_starts_without_what_it_does_not_need() -> None:
    heavy = (
        "scipy",
        "sklearn",
        "matplotlib",
        "jinja2",
        "diffusers",
        "transformers",
        "torch._dynamo",
        "warmfed.report",
        "warmfed.run",
    )
    words = f"import sys, warmfed.deploy.client_app; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_site_knows_what_has_left_it(consortium: Consortium, tmp_path: Path) -> None:
    consortium.serve()
    left = read_lines(tmp_path / "site-a" / "work" / "ledger.jsonl", "the ledger")
    assert [line["stage"] for line in left] == ["hello", "train", "evaluate", "train", "evaluate", "finish"]
    assert left[1]["tensors"] == {"model/head.bias": ["float32", [3]], "model/head.weight": ["float32", [3, 192]]}
    crossed = [line for line in read_lines(tmp_path / "run" / "ledger.jsonl", "it") if line.get("direction") == "up"]
    mine = [(line["bytes"], line["sha256"]) for line in crossed if line["site"] == "a"]
    assert mine == [(line["bytes"], line["sha256"]) for line in left if line["stage"] == "train"]


def test_the_server_resumes_and_sites_repeat_their_answers(
    consortium: Consortium, whole: dict[str, Any], tmp_path: Path
) -> None:
    seen: list[str] = []

    class Stop(BaseException):
        pass

    def crash(node: int, message: Message, reply: Message) -> Message:
        seen.append(message.metadata.message_type)
        if seen.count("train.train") == 7:  # in the middle of the second round
            raise Stop
        return reply

    with pytest.raises(Stop):
        consortium.serve(crash)
    memories = {path: path.stat().st_mtime_ns for path in tmp_path.glob("site-*/work/runs/*/*.safetensors")}
    same(consortium.serve(), whole)
    again = [path for path, when in memories.items() if path.stat().st_mtime_ns == when]
    assert len(again) == 3  # those that had answered the second round
    same(consortium.serve(), whole)  # a finished run is left as it is


def test_a_run_of_other_settings_is_not_taken_up(consortium: Consortium, tmp_path: Path) -> None:
    consortium.serve()
    settings(consortium.config, seed=1)
    with pytest.raises(InputError, match="other settings"):
        consortium.serve()


def model(answer: Answer, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Answer:
    message = Model(change(dict(answer.body.message.model)))
    return replace(answer, body=replace(answer.body, message=message))


def unsealed(message: Message, reply: Message) -> Message:
    reply.content["seal"]["sha256"] = "0" * 64
    return reply


def failed(message: Message, reply: Message) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "out of memory"), reply_to=message)


FAULTS: dict[str, tuple[Callable[[Message, Message], Message | None], str]] = {
    "NaN": (spoil(lambda a: model(a, lambda m: {n: t * float("nan") for n, t in m.items()})), "is not finite"),
    "wrong shape": (spoil(lambda a: model(a, lambda m: {n: t[:1] for n, t in m.items()})), "expected float32 [3]"),
    "oversized": (
        spoil(lambda a: model(a, lambda m: {**m, "x": torch.zeros(50_000)})), "expected at most 100,000 "
    ),
    "too far": (spoil(lambda a: model(a, lambda m: {n: t + 1e6 for n, t in m.items()})), "expected at most 1000"),
    "replayed": (spoil(lambda a: replace(a, step=a.step - 1)), "for step 0, expected 1 (a replay?)"),
    "of another run": (spoil(lambda a: replace(a, run="0" * 16)), "expected"),
    "of another site": (spoil(lambda a: replace(a, site="a")), "names site 'a', expected 'b'"),
    "unsealed": (unsealed, "do not match the declared size or SHA-256"),
    "pickle": (lambda message, reply: tampered(reply, b"\x80\x05cos\nsystem\n."), "not declared here"),
    "none": (lambda message, reply: None, "it has not answered in time"),
    "a failure": (failed, "its app has failed: out of memory"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_its_site_out_of_one_round(fault: str, tmp_path: Path, data: Path) -> None:
    spoiled, reason = FAULTS[fault]
    consortium = Consortium(
        tmp_path, data, min_sites=3, max_update_norm=1000.0, max_reply_bytes=100_000,
        stage_timeout=0.5 if fault == "none" else 5.0,
    )  # fmt: skip
    seen: list[int] = []

    def tamper(node: int, message: Message, reply: Message) -> Message | None:
        if node != consortium.node("b") or message.metadata.message_type != "train.train":
            return reply
        seen.append(node)
        return spoiled(message, reply) if len(seen) == 2 else reply

    consortium.serve(tamper)
    first, second = consortium.records()
    assert "absent" not in first
    assert list(second["absent"]) == ["b"]
    assert reason in second["absent"]["b"]
    assert sorted(second["train"]) == ["a", "c", "d"]
    assert sorted(second["personal"]) == list(SITES)  # it answers again


def test_who_must_be_there_is_waited_for(consortium: Consortium, data: Path) -> None:
    del consortium.folders[consortium.node("c")]
    settings(consortium.config, server=SETTINGS["server"] | {"stage_timeout": 1.5})
    with pytest.raises(InputError, match="3 sites have connected"):
        consortium.serve()
    settings(consortium.config, server=SETTINGS["server"] | {"stage_timeout": 1.5, "min_sites": 3})
    consortium.serve()
    assert consortium.records()[0]["absent"] == {"c": "it is not connected (1.5 s)"}


def test_a_late_site_joins(consortium: Consortium) -> None:
    late = consortium.node("c")
    folder = consortium.folders.pop(late)
    settings(consortium.config, server=SETTINGS["server"] | {"stage_timeout": 1.0, "min_sites": 3})

    def join(node: int, message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "evaluate":
            consortium.folders[late] = folder
        return reply

    consortium.serve(join)
    assert [sorted(r["train"]) for r in consortium.records()] == [["a", "b", "d"], list(SITES)]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"classes": ["2", "1", "0"]}, "has classes"),
        ({"prompts": "the digit {}"}, "has template"),
        ({"policy": OPEN | {"algorithms": ["fedavg"]}}, "only fedavg may"),
        ({"classes": ["0", "1"]}, "not among the consortium"),
    ],
)
def test_a_site_that_does_not_agree_is_refused(
    config: dict[str, Any], told: str, consortium: Consortium, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    consortium.site("d", data={"source": str(data)}, **config)
    settings(consortium.config, server=SETTINGS["server"] | {"stage_timeout": 2.0})
    with pytest.raises(InputError):
        consortium.serve()
    (heard,) = {line for line in capsys.readouterr().out.splitlines() if line.startswith("the server has refused this site: ")}
    assert told in heard
    heard_by = [
        name for name in SITES if "refused" in (consortium.folder / f"site-{name}" / "work" / "ledger.jsonl").read_text()
    ]
    assert heard_by in (["d"], list(SITES))  # the run is not begun; or it is, without one that cannot take part
    assert not (consortium.folder / "run").exists()


def test_two_nodes_of_one_name_are_refused(consortium: Consortium) -> None:
    consortium.folders[5] = consortium.folders[consortium.node("a")]
    with pytest.raises(InputError, match="two nodes are site 'a'"):
        consortium.serve()


def request(**changes: Any) -> Request:
    asked = Request("0" * 16, "a", tomli_w.dumps(SETTINGS), "train", 0, 0, Model({}))
    return replace(asked, **changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"site": "b"}, "is for site 'b', this is 'a'"),
        ({"run": "../../../etc"}, "is not a run's name"),
        ({"step": 9}, "step 9 is not stage 'train'"),
        ({"stage": "distil"}, "step 0 is not stage 'distil'"),
        ({"config": "seed = x"}, "is not TOML"),
        ({"config": "sead = 1"}, "unknown key 'sead'"),
        ({"stage": "evaluate"}, "without models"),
    ],
)
def test_a_site_refuses_what_makes_no_sense(changes: dict[str, Any], told: str, consortium: Consortium) -> None:
    folder = consortium.folders[consortium.node("a")]
    found = decode(answer(folder, encode(request(**changes))), Answer)
    assert told in found.body.reason
    assert not (folder / "work" / "runs").exists()
    assert json.loads((folder / "work" / "ledger.jsonl").read_text())["kind"] == "wire.Refusal"


def test_a_site_without_a_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text('name = "../x"\n')
    with pytest.raises(InputError, match="without slashes"):
        answer(tmp_path, encode(request()))


def test_every_type_of_tensor_survives_the_records() -> None:
    types = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8, torch.int64, torch.bool]
    sent = encode(Model({str(t): torch.tensor([[0, 1], [1, 1]]).to(t) for t in types} | {"empty": torch.zeros(0, 3)}))
    assert unpack(pack(sent)) == sent
    assert encode(decode(unpack(pack(sent)))) == sent


def bad_records() -> dict[str, RecordDict]:
    sent = encode(Model({"w": torch.ones(3)}))

    def made(array: Array, **seal: Any) -> RecordDict:
        plain = {"kind": "averaging.Model", "bytes": len(sent), "sha256": digest(sent)}
        return RecordDict({"message": ArrayRecord({"message": array}), "seal": ConfigRecord({**plain, **seal})})

    size = (len(sent),)
    array = Array(dtype="uint8", shape=size, stype="warmfed.message", data=sent)
    return {
        "nothing": RecordDict({}),
        "no seal": RecordDict({"message": ArrayRecord({"message": array})}),
        "another kind": made(array, kind="core.Nothing"),
        "an unknown kind": made(array, kind="os.system"),
        "another size": made(array, bytes=3),
        "another digest": made(array, sha256=digest(b"")),
        "another type": made(Array(dtype="uint8", shape=size, stype="numpy.ndarray", data=sent)),
        "another shape": made(Array(dtype="uint8", shape=(3,), stype="warmfed.message", data=sent)),
        "too many": made(array, more=1),
    }


@pytest.mark.parametrize("name", bad_records())
def test_records_that_are_no_message_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        unpack(bad_records()[name])


SAMPLING = ("warmfed", "warmfed-paper", "fgl", "feddeo", "fedbip", "feddf")
"""They need a base's image size; `tests_deploy` runs WarmFed in a real deployment."""
DRAWING = {"width": 32, "depth": 1, "latent": "", "times": 20, "steps": 2}


@pytest.mark.parametrize("name", [name for name in sorted(ALGORITHMS) if name not in (*SAMPLING, "fedavg-public")])
def test_every_method_over_flower_is_unchanged(name: str, data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "algorithm": {"name": name, "rounds": 1, "local": {"epochs": 1}},
        "model": {"name": "cnn"},
        "denoising": DRAWING,
        "evaluation": {"samples": 0},
    }
    there = Consortium(tmp_path, data)
    there.config = settings(tmp_path / "server.toml", **changes)
    here = execute(parse(settings(tmp_path / "here.toml", data={"source": str(data)}, **changes)), tmp_path / "here")
    same(there.serve(), here)
