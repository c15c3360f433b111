"""What is refused before a run writes anything."""

from pathlib import Path

import pytest
import tiny

from warmfed.cli.parser import main
from warmfed.config import Config, parse
from warmfed.data import Federation, FederationInfo
from warmfed.runs.dry_run import dry_run
from warmfed.runs.prepare import load_data, prepare
from warmfed.utils.errors import InputError

ALGORITHMS = ("warmfed", "fgl", "feddeo", "fedbip")


def config(folder: Path, algorithm: str, template: str, *classes: str) -> Config:
    if not folder.exists():
        tiny.pictures(folder, {site: dict.fromkeys(classes, 8) for site in ("a", "b")})
    data = {"data.source": "folder", "data.path": str(folder), "data.options.template": template}
    return parse(None, {**data, "data.options.image_size": 32, "algorithm.name": algorithm, "algorithm.rounds": 1})


def info(federation: Federation) -> FederationInfo:
    facts = (federation.shape, federation.rows, federation.digests)
    return FederationInfo(federation.name, federation.classes, federation.template, *facts)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_prompts_that_the_base_reads_alike_are_refused(algorithm: str, tmp_path: Path) -> None:
    """With and without weights, with images and, as a server, without."""
    asked = config(tmp_path / "data", algorithm, "a photo of a {}", "犬", "猫")
    known = load_data(asked.data)
    for federation in (known, info(known)):
        for weights in (True, False):
            with pytest.raises(InputError, match="classes '犬' and '猫' have the same prompt"):
                prepare(asked, federation, weights=weights)
    with pytest.raises(InputError, match="have the same prompt"):
        dry_run(asked)


def test_a_template_that_is_cut_at_one_site_names_the_site(tmp_path: Path) -> None:
    template = "a {site|b=photograph from a hospital that is far away} of a {}"
    asked = config(tmp_path / "data", "fgl", template, "cat", "dog")
    with pytest.raises(InputError, match="at site 'b': it reads 16 tokens"):
        prepare(asked)


def test_an_algorithm_without_a_generator_takes_any_names(tmp_path: Path) -> None:
    prepare(config(tmp_path / "data", "fedavg", "a photo of a {}", "犬", "猫"))


def test_the_command_line_says_it_in_one_line_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = config(tmp_path / "data", "fgl", "a photo of a {}", "犬", "猫")
    settings = ["data.source=folder", f"data.path={asked.data.path}", "data.options.image_size=32"]
    command = ["run", "--algorithm", "fgl", "--out", str(tmp_path / "run"), "--set", *settings]
    assert main([*command, "data.options.template=a photo of a {}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()
