"""A site's own policy, tested with requests of a malicious server."""

import logging
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tomli_w
import torch

pytest.importorskip("flwr")
from consortium import OPEN, SITES, Consortium, settings
from flwr.app import Message

from warmfed.algorithms import ALGORITHMS
from warmfed.algorithms.baselines import Images
from warmfed.algorithms.shared.base import Model
from warmfed.config import parse, resolve
from warmfed.core import Empty
from warmfed.core.messages import decode, encode
from warmfed.deploy.policy import Policy, agreed, images_in, toml
from warmfed.deploy.site import SiteConfig, _local, answer, read_site
from warmfed.transports.flower import unpack
from warmfed.transports.protocol import Answer, Models, Refusal, Request
from warmfed.utils.errors import InputError
from warmfed.utils.files import read_lines

RUN = "0123456789abcdef"
CENTRALIZED = {"algorithm": {"name": "centralized", "rounds": 1, "local": {"epochs": 1}}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.arrays(tmp_path_factory.mktemp("data") / "toy.npz", SITES)


@pytest.fixture
def consortium(tmp_path: Path, data: Path) -> Consortium:
    return Consortium(tmp_path, data, stage_timeout=2.0)


def ledger(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "work" / "ledger.jsonl", "the ledger")


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({}, 'algorithms = ["centralized"] below [policy]'),
        (OPEN | {"algorithms": ["ditto"]}, "algorithm.name is 'centralized', only ditto may"),
        (OPEN | {"images": False}, "stage 'collect' sends images of the site, which needs images = true"),
    ],
    ids=["no policy", "another algorithm", "no images"],
)
def test_no_image_leaves_because_the_server_says_so(
    policy: dict[str, Any],
    reason: str,
    consortium: Consortium,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in SITES:
        consortium.site(name, data={"source": str(data)}, policy=policy)
    settings(consortium.config, **CENTRALIZED, server={"sites": list(SITES), "stage_timeout": 2.0})
    left: list[bytes] = []

    def listen(node: int, message: Message, reply: Message) -> Message:
        left.append(unpack(reply.content))
        return reply

    with caplog.at_level(logging.INFO, logger="flwr"), pytest.raises(InputError, match="0 sites have connected"):
        consortium.serve(listen)
    images = np.load(data)
    rows = [image.tobytes() for site in SITES for image in images[f"{site}_x_train"]]
    assert rows
    assert left
    assert not any(row in letter for row in rows for letter in left)
    assert not any(b"SiteInfo" in letter for letter in left)
    told = capsys.readouterr().out
    for name in SITES:
        first = ledger(consortium.folder / f"site-{name}")[0]
        assert (first["kind"], first["stage"], first["algorithm"]) == ("wire.Refusal", "hello", "centralized")
        assert reason in first["reason"]
        assert f"this site has refused a request (hello): {first['reason']}" in told
        assert f"it refused: {first['reason']}" in caplog.text
        assert not (consortium.folder / f"site-{name}" / "work" / "runs").exists()


def test_what_stays_at_a_site_is_as_agreed() -> None:
    """Which part of a model is private is a text of the configuration: with another one, all of the model would leave."""
    policy = Policy(algorithms=("fedper",))
    told = ["algorithm.private is 'nothing.', only 'head.' is allowed (policy.limits)"]
    assert policy.excess(parse(None, {"algorithm.name": "fedper", "algorithm.private": "nothing."})) == told


def test_images_leave_where_the_site_has_written_so(consortium: Consortium) -> None:
    settings(consortium.config, **CENTRALIZED, server={"sites": list(SITES), "stage_timeout": 60.0})
    consortium.serve()
    lines = ledger(consortium.folder / "site-a")
    assert [line["kind"] for line in lines if line["stage"] == "collect"] == ["references.Images"]


def site(folder: Path, data: Path, **policy: Any) -> Path:
    """A site's folder that takes part in the agreed run of FedAvg, and what else is said."""
    folder.mkdir(exist_ok=True)
    usual = tomllib.loads(toml(agreed(parse(None, FEDAVG))))["policy"]
    table = {"name": "a", "data": {"source": str(data)}, "policy": usual | policy}
    (folder / "site.toml").write_text(tomli_w.dumps(table))
    return folder


FEDAVG = {"algorithm.name": "fedavg", "algorithm.rounds": 2, "algorithm.local.epochs": 2, "model.name": "linear"}


def asked(changes: Mapping[str, Any] | None = None, **fields: Any) -> Request:
    text = parse(None, FEDAVG | {"generator.training.epochs": 1} | dict(changes or {})).toml()
    return replace(Request(RUN, "a", text, "hello", 0, 0, None), **fields)


def refused(folder: Path, request: Request) -> str:
    """Return the reason why the site rejects a request; its ledger has the same reason."""
    body = decode(answer(folder, encode(request)), Answer).body
    assert isinstance(body, Refusal), body
    assert ledger(folder)[-1]["reason"] == body.reason
    return body.reason


OUTSIDE = [
    ({"algorithm.local.epochs": 3}, "algorithm.local.epochs is 3, at most 2 is allowed (policy.limits)"),
    ({"algorithm.rounds": 10**12}, "algorithm.rounds is 1000000000000, at most 2 is allowed"),
    ({"algorithm.local.steps": 1}, "algorithm.local.steps is 1, at most 0 is allowed"),
    ({"algorithm.local.batch_size": 1}, "takes 1 images a step, at least 32 must be (policy.min_batch)"),
    ({"algorithm.local.batch_size": 4096}, "algorithm.local.batch_size is 4096, at most 32 is allowed"),
    ({"generator.rank": 4096}, "generator.rank is 4096, at most 6 is allowed"),
    ({"denoising.width": 2**20}, "denoising.width is 1048576"),
    ({"generator.base": "/etc"}, "generator.base is '/etc', this site has only digits"),
    ({"generator.base": "stabilityai/sdxl"}, "generator.base is 'stabilityai/sdxl'"),
    ({"denoising.latent": "../secrets"}, "denoising.latent is '../secrets'"),
    ({"model.start": "/etc/passwd"}, "the run starts from a file; set start in site.toml"),
    ({"generator.adapters.a": "/etc/passwd"}, "the run sets generator.adapters to files of the server"),
    ({"algorithm.local.optimizer": "adam"}, "algorithm.local.optimizer is 'adam', only 'sgd' is allowed"),
    ({"model.name": "../x"}, "the run's network is '../x', which this site does not allow"),
]


@pytest.mark.parametrize("stage", ["hello", "train", "evaluate", "finish"])
@pytest.mark.parametrize(("changes", "told"), OUTSIDE, ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_what_was_not_agreed_is_refused(changes: dict[str, Any], told: str, stage: str, data: Path, tmp_path: Path) -> None:
    folder = site(tmp_path / "a", data)
    body = Models(Model({}), {}) if stage in ("evaluate", "finish") else Model({})
    assert told in refused(folder, asked(changes, stage=stage, body=body))
    assert not (folder / "work" / "runs").exists()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"number": 1, "stage": "train"}, "step 0 is number 0 of stage 'train', not 1"),
        ({"step": -1, "stage": "train"}, "step -1 is not stage 'train'"),
        ({"step": 10**30, "stage": "evaluate"}, "a request to evaluate must have step 0"),
        ({"run": ""}, "is not a run's name"),
        ({"run": "../../etc/passwd"}, "is not a run's name"),
        ({"config": "a = " + "[" * 5000}, "nested too deeply"),
        ({"config": "seed = " + "{a=" * 900 + "1" + "}" * 900}, "nested too deeply"),
        ({"config": "#" * 10**6}, "has 1,000,000 characters, expected at most 65,536"),
        ({"body": Model({"w": torch.zeros(10**6)})}, "the request has 4,0"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], told: str, data: Path, tmp_path: Path) -> None:
    folder = site(tmp_path / "a", data, max_bytes=2_000_000)
    assert told in refused(folder, asked(**fields))


def test_what_is_no_request_is_in_the_ledger_too(data: Path, tmp_path: Path) -> None:
    folder = site(tmp_path / "a", data)
    with pytest.raises(InputError, match="not a warmfed message"):
        answer(folder, b"\x80\x05cos\nsystem\n.")
    assert "not a warmfed message" in ledger(folder)[-1]["reason"]


def test_a_reason_is_bounded_and_has_no_control_characters(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = site(tmp_path / "a", data)
    assert decode(answer(folder, encode(asked(stage="refused", body=Refusal("\x1b[2J" + "x" * 9999)))), Answer).body
    assert "\x1b" not in refused(folder, asked(site="\x1b[2J" * 999, stage="\x1b[31m" * 999))
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert max(map(len, told.splitlines())) < 400
    assert max(len(line["stage"]) for line in ledger(folder)) <= 40


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ({"max_runs": 1}, "this is run 2 of the site, at most 1 are answered (policy.max_runs)"),
        ({"max_requests": 1}, "this is request 2 of the run, at most 1 are answered (policy.max_requests)"),
        ({"max_bytes": 3000}, "3,000 are allowed (policy.max_bytes)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_site_answers_no_more_than_it_allows(policy: dict[str, Any], told: str, data: Path, tmp_path: Path) -> None:
    folder = site(tmp_path / "a", data, **policy)
    model = Model({"head.weight": torch.zeros(3, 192), "head.bias": torch.zeros(3)})
    train = asked(stage="train", body=model)
    first = decode(answer(folder, encode(train)), Answer).body
    assert not isinstance(first, Refusal)
    again = {"run": "f" * 16} if "max_runs" in policy else {"step": 1, "number": 1}
    assert told in refused(folder, replace(train, **again))
    assert sum(line["bytes"] for line in ledger(folder) if "reason" not in line) <= read_site(folder).policy.max_bytes
    assert [path.name for path in (folder / "work" / "runs").iterdir()] == [RUN]


def test_what_a_run_names_is_not_opened_here(tmp_path: Path) -> None:
    """Settings that name files and that a site replaces by its own."""
    secret = str(tmp_path / "secret")
    changes = {"evaluation.features": secret, "data.source": secret, "data.path": secret, "data.cache": secret}
    run = {"algorithm.name": "fedavg-tun", "generator.compile": "inductor", "evaluation.samples": 9}
    local = _local(SiteConfig(name="a", policy=Policy(algorithms=("fedavg-tun",))), parse(None, run | changes).toml())
    assert secret not in local.toml()
    assert (local.generator.compile, local.evaluation.samples, local.device) == ("", 0, "cpu")


def test_the_own_base_of_a_site(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    policy = Policy(algorithms=("warmfed",))
    there = parse(None, {"generator.base": "/srv/base"}).toml()
    assert _local(SiteConfig(name="a", base="base", policy=policy, folder=tmp_path), there).generator.base == str(
        tmp_path / "base"
    )
    named = SiteConfig(name="a", base="org/model", policy=policy, folder=tmp_path)
    assert _local(named, parse(None, {"generator.base": "org/model"}).toml()).generator.base == "org/model"
    with pytest.raises(InputError, match=r"generator\.base is 'digits', 'org/model' was agreed"):
        _local(named, parse().toml())


def test_a_network_runs_only_if_the_site_names_it(tmp_path: Path) -> None:
    """A server must not make a site import a module or open a folder."""
    policy = Policy(algorithms=("fedavg",))
    own = parse(None, {"algorithm.name": "fedavg", "model.name": "python:own_networks:layer_norm"}).toml()
    with pytest.raises(InputError, match="which this site does not allow; if the site has installed it and agrees"):
        _local(SiteConfig(name="a", policy=policy), own)
    with pytest.raises(InputError, match="which this site does not allow"):
        _local(SiteConfig(name="a", network="python:own_networks:batch_norm", policy=policy), own)
    allowed = SiteConfig(name="a", network="python:own_networks:layer_norm", policy=policy)
    assert _local(allowed, own).model.name == "python:own_networks:layer_norm"
    there = parse(None, {"algorithm.name": "fedavg", "model.backbone": "/srv/vit"}).toml()
    with pytest.raises(InputError, match=r"set network in site\.toml to this site's copy"):
        _local(SiteConfig(name="a", policy=policy), there)
    assert _local(SiteConfig(name="a", network="vit", policy=policy, folder=tmp_path), there).model.backbone == str(
        tmp_path / "vit"
    )


FREE = {"generator.negative_prompt"}
"""Texts of a configuration that may be anything: a prompt."""
REPLACED = {"generator.compile", "data.source", "data.path", "data.cache", "evaluation.features", "holdout.site"}
"""Texts that a site replaces by its own."""


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_text_of_a_configuration_is_one_of_a_few_or_is_known_here(name: str) -> None:
    """A new setting with a file's name needs a review: a server might point a site at any file with it."""
    site = SiteConfig(name="a", policy=Policy(algorithms=(name,), images=True))
    passed = set()
    for key in texts(tomllib.loads(resolve({"algorithm": {"name": name}}).toml())):
        try:
            local = _local(site, parse(None, {"algorithm.name": name, key: "/etc/passwd"}).toml())
        except InputError:
            continue
        passed.add(key)
        assert ("/etc/passwd" in local.toml()) == (key in FREE)
    assert passed == FREE | REPLACED


def texts(table: Mapping[str, Any], above: str = "") -> list[str]:
    """The dotted names of the texts in nested tables."""
    found = []
    for part, value in table.items():
        if isinstance(value, Mapping):
            found += texts(value, f"{above}{part}.")
        elif isinstance(value, str):
            found.append(above + part)
    return found


def test_every_stage_says_whether_it_sends_images() -> None:
    found = {
        name: [s.images for s in resolve({"algorithm": {"name": name}}).algorithm.stages() if s.client] for name in ALGORITHMS
    }
    assert {name for name, images in found.items() if None in images} == set()
    assert {name for name, images in found.items() if True in images} == {"centralized", "centralized-converged", "fedbip"}
    plan = resolve({"algorithm": {"name": "fedavg"}}).algorithm.stages()
    forgotten = [replace(stage, images=None) for stage in plan]
    for policy in (Policy(), Policy(images=True)):
        assert policy.sending(forgotten) == ["stage 'train' does not declare whether its replies hold images"]


def test_images_are_found_whatever_they_are_called(data: Path) -> None:
    images = torch.from_numpy(np.load(data)["a_x_train"])
    others = torch.from_numpy(np.load(data)["b_x_train"])
    scaled = images[3:4].float() / 127.5 - 1
    for hidden in (images, images[5], scaled, scaled.half(), -scaled.reshape(1, 192), torch.cat([others, images[:1]])):
        assert images_in(Model({"plain": torch.zeros(3, 192), "w": hidden}), [images]) == "model/w"
    assert images_in(Images({"image": others}, {}), [images[:0], images]) == ""
    assert images_in(Model({"w": torch.zeros(192), "nan": torch.full((192,), float("nan"))}), [images]) == ""
    assert images_in(Empty(), [images]) == ""


def test_a_mean_of_one_image_does_not_leave(tmp_path: Path) -> None:
    """FedProto's mean feature of a class with one image is that image, where the features are the pixels."""
    toy = dict(np.load(tiny.arrays(tmp_path / "whole.npz", "a")))
    np.savez(tmp_path / "few.npz", **{key: value[:3] if "train" in key else value for key, value in toy.items()})
    policy = {"algorithms": ["fedproto"], "limits": {}, "max_bytes": 10**6, "min_batch": 1}
    found = {}
    for name in ("whole", "few"):
        folder = site(tmp_path / name, tmp_path / f"{name}.npz", **policy)
        text = parse(None, {"algorithm.name": "fedproto", "model.name": "linear"}).toml()
        request = asked(stage="train", config=text, body=_empty_prototypes())
        found[name] = decode(answer(folder, encode(request)), Answer).body
    assert not isinstance(found["whole"], Refusal)
    assert "tensor 'feature/mean' of the reply holds images" in found["few"].reason


def _empty_prototypes() -> Any:
    from warmfed.algorithms.fedproto import Prototypes

    return Prototypes({}, {})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('algorithms = ["fedavg"]', r"site\.toml: algorithms is a setting of \[policy\] now"),
        ("[policy]\nalgoritms = []", "unknown key 'policy.algoritms'; did you mean 'algorithms'"),
        ('[policy]\nalgorithms = ["fedavgg"]', "unknown algorithm 'fedavgg'; did you mean 'fedavg'"),
        ("[policy]\nimages = 1", "policy.images must be of type bool"),
        ("[policy]\nmax_runs = -1", "must be at least 0"),
        (
            '[policy]\nalgorithms = ["fedavg"]\nlimits = { "algorithm.local.epoch" = 1 }',
            "did you mean 'algorithm.local.epochs'",
        ),
        ('[policy]\nalgorithms = ["fedavg"]\nlimits = { "algorithm.rounds" = 5.5 }', "must be a text, or a whole number"),
    ],
)
def test_a_policy_that_cannot_be_read(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(f'name = "a"\n{text}\n')
    with pytest.raises(InputError, match=told):
        read_site(tmp_path)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_written_allows_the_agreed_run_and_no_images(name: str, tmp_path: Path) -> None:
    config = parse(None, {"algorithm.name": name})
    (tmp_path / "site.toml").write_text(f'name = "a"\n{toml(agreed(config))}')
    policy = read_site(tmp_path).policy
    assert policy == agreed(config)
    assert policy.excess(config) == []
    assert policy.images is False
