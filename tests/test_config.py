"""A configuration is checked completely before a run starts."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from warmfed.algorithms import ALGORITHMS
from warmfed.config import build, parse, setting, with_absolute_paths
from warmfed.runs.prepare import prepare
from warmfed.utils.errors import InputError


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_what_is_written_is_read_back(name: str) -> None:
    config = parse(None, {"algorithm.name": name, "seed": 7})
    assert build(tomllib.loads(config.toml())) == config
    assert isinstance(config.algorithm, ALGORITHMS[name].cls)


def test_later_layers_win(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('seed = 3\n[algorithm]\nname = "fedprox"\nrounds = 2\nlocal = { lr = 1 }\n')
    config = parse(file, {"algorithm.rounds": 1})
    assert (config.name, config.seed, config.algorithm.rounds, config.algorithm.local.lr) == ("fedprox", 3, 1, 1.0)
    assert config.algorithm.local.epochs == ALGORITHMS["fedprox"].cls().local.epochs


def test_a_name_brings_its_settings_and_the_user_may_change_them() -> None:
    assert parse(None, {"algorithm.name": "fedavg-public"}).model.start == "public"
    assert parse(None, {"algorithm.name": "fedavg-public", "model.start": "x"}).model.start == "x"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1), ("a=1.5", 1.5), ("a=true", True), ("a=text", "text"), ('a="1"', "1"), ("a=", ""), ("a=b=c", "b=c"),
        ("a=[1, 2]", [1, 2]), ("a = 1", 1), ("a=/tmp/x y", "/tmp/x y"),
    ],
)  # fmt: skip
def test_values_of_the_command_line(text: str, value: Any) -> None:
    assert setting(text) == ("a", value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("algorithm.roundz", 1, "unknown key 'algorithm.roundz'; did you mean 'rounds'"),
        ("sead", 1, "unknown key 'sead'; did you mean 'seed'"),
        ("algorithm.local.lrr", 1, "did you mean 'lr'"),
        ("seed", "one", "seed must be of type int; got 'one'"),
        ("seed", True, "seed must be of type int; got True"),
        ("seed", 1.0, "seed must be of type int; got 1.0"),
        ("algorithm.gate", 1, "algorithm.gate must be of type bool; got 1"),
        ("model", "cnn", "model must be a table"),
        ("seed.x", 1, "seed must be of type int"),
        ("algorithm", "fedavg", 'write algorithm.name = "fedavg"'),
        ("algorithm.name", "fedavgg", "did you mean 'fedavg'"),
        ("algorithm.before", "never", "client, server, none"),
        ("algorithm.local.batch_size", 0, "at least 1"),
        ("algorithm.local.lr", -0.1, "lr, weight_decay, max_grad_norm and warmup must be finite and at least 0"),
        ("generator.guidance", -1.0, "generator.guidance must be finite and not below zero; got -1.0"),
        ("generator.guidance", float("nan"), "generator.guidance must be finite and not below zero; got nan"),
        ("server.max_update_norm", float("inf"), "correct [server]"),
        ("server.stage_timeout", 0.0, "stage_timeout above 0"),
        ("generator.size", -1, "expected generator.size in pixels"),
        ("generator.adapters", "a.safetensors", "generator.adapters must be a table of settings; got 'a.safetensors'"),
        ("border.least", 1, "border is now called server; rename it"),
        ("server.least", 1, "server.least is now called server.min_sites; rename it"),
        ("measuring.samples", 1, "measuring is now called evaluation"),
        ("algorithm.sample", 0.5, "algorithm.sample is now called algorithm.client_fraction"),
        ("algorithm.local.clip", 1.0, "algorithm.local.clip is now called algorithm.local.max_grad_norm"),
        ("algorithm.synthesis.least", 0.1, "algorithm.synthesis.least is now called algorithm.synthesis.min_class_probability"),
        ("generator.lora.prior", 1.0, "generator.lora.prior is now called generator.lora.prior_loss_weight"),
        ("generator.targets", "all", "generator.targets is now called generator.target_modules"),
    ],
)
def test_faults(key: str, value: Any, words: str) -> None:
    with pytest.raises(InputError) as error:
        parse(None, {key: value})
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"workers": 0}, "workers must be at least 1"),
        ({"device": "tpu"}, "cpu, cuda"),
        ({"evaluate": "often"}, "every, last, never"),
        ({"algorithm.rounds": 0}, "no stages in 0 rounds"),
        ({"algorithm.rounds": -1}, "no stages in -1 rounds"),
        ({"algorithm.client_fraction": 0.0}, "client_fraction must be more than 0"),
        ({"data.source": "digits5"}, "did you mean 'digits4'"),
        ({"data.options.alfa": 1.0}, "did you mean 'alpha'"),
        ({"data.options.name": "x"}, "has no option 'name'"),
        ({"data.options.partition": 3}, "data.options.partition must be a table"),
        ({"data.options.partition": {"rule": "file"}}, "data.options.partition needs path"),
        ({"model.name": "cmn"}, "did you mean 'cnn'"),
        ({"model.start": "/nowhere.safetensors"}, "cannot read the classifier to start from"),
        ({"model.name": "pfllib-cnn", "data.options.alpha": 0.0}, "alpha"),
    ],
)
def test_what_cannot_run_is_refused_before_it_starts(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        prepare(parse(None, {"algorithm.name": "fedavg", **settings}))
    assert words in str(error.value)


def test_what_is_no_toml(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("seed = ")
    with pytest.raises(InputError, match="is not TOML"):
        parse(tmp_path / "run.toml")
    with pytest.raises(InputError, match="cannot read the configuration"):
        parse(tmp_path / "none.toml")


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_file_with_a_byte_order_mark(end: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfseed = 3" + end)
    assert parse(tmp_path / "run.toml").seed == 3


def test_paths_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    table = {
        "data.source": "csv", "data.path": "t.csv", "data.cache": "~/c", "data.options.root": "../pictures",
        "data.options.partition": {"rule": "file", "path": "p.json"}, "generator.adapters": {"ink ": "a.safetensors"},
    }  # fmt: skip
    found = with_absolute_paths(parse(None, table))
    assert found.data.path == str(tmp_path / "t.csv")
    assert found.data.cache == str(Path.home() / "c")
    assert Path(found.data.options["root"]).is_absolute()
    assert found.data.options["partition"]["path"] == str(tmp_path / "p.json")
    assert found.generator.adapters == {"ink": str(tmp_path / "a.safetensors")}
    assert (found.generator.base, found.model.start) == ("digits", "auto")
    assert with_absolute_paths(parse(None, {"generator.base": "base"})).generator.base == str(tmp_path / "base")
    assert with_absolute_paths(parse(None, {"data.source": "hub", "data.path": "a/b"})).data.path == "a/b"
    assert with_absolute_paths(parse(None, {"data.source": "npz:x.npz"})).data.source == "npz:x.npz"
    (tmp_path / "x.npz").write_bytes(b"")
    assert with_absolute_paths(parse(None, {"data.source": "npz:x.npz"})).data.source == f"npz:{tmp_path / 'x.npz'}"
    assert with_absolute_paths(found) == found
