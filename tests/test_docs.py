"""Documentation: the README's example runs, links resolve, every algorithm has a page."""

import dataclasses
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from warmfed import __version__
from warmfed.algorithms import ALGORITHMS
from warmfed.algorithms.fedavg import FedAvg
from warmfed.algorithms.shared.synthetic_data import Synthesis
from warmfed.cli.parser import parser
from warmfed.config import data_table, parse, pretraining_tables, read_toml, resolve, setting
from warmfed.data import load
from warmfed.diffusion.generator import LatentDiffusion
from warmfed.experiments import compare
from warmfed.pretraining.pretrain import Pretraining
from warmfed.utils.errors import InputError

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
INDEX = ROOT / "docs" / "algorithms" / "README.md"
FILES = sorted([*(ROOT / "benchmarks").rglob("*.toml"), *(ROOT / "examples").glob("*.toml")])
SHORT = (
    "LatentDiffusion()",
    'LatentDiffusion(steps=2, views=1, training=Training(optimizer="adamw", lr=1e-3, steps=4, batch_size=16))',
)
"""The example adapts and samples for a minute; here it does the same with fewer steps."""


def test_the_readme_example_runs(tmp_path: Path) -> None:
    source = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert source
    code = source.group(1)
    assert len(code.splitlines()) <= 20
    assert SHORT[0] in code
    file = tmp_path / "example.py"
    file.write_text("from warmfed import Training\n" + code.replace(*SHORT))
    ran = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert [line.split()[:2] for line in lines if "global" in line] == [
        ["fedavg", "train"], ["warmfed", "warm"], ["warmfed", "gate"], ["warmfed", "personalize"],
    ]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [t for t in targets if not t.startswith(("http", "mailto")) and not (page.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_there(page: Path) -> None:
    """Those that are to be copied can be; those that a sentence names exist, with these options."""
    text = page.read_text().replace("\\\n", " ")
    fence = re.compile(r"```\w*\n(.*?)```", re.S)
    lines = [line for block in fence.findall(text) for line in block.splitlines()]
    copied = [line for line in lines if line.startswith("warmfed ")]
    named = [" ".join(span.split()) for span in re.findall(r"`(warmfed [^`]+)`", fence.sub("", text))]
    wrong = []
    for command in copied + named:
        words = [word for word in shlex.split(command, comments=True)[1:] if word != "…"]
        try:
            parser().parse_args(words)
        except InputError as error:
            unfinished = re.search("are required|expected one argument|choice: 'COMMAND'", str(error))
            if command in copied or not unfinished:
                wrong.append(f"{command}: {error}")
    assert wrong == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_configurations_are_read(file: Path) -> None:
    tables = read_toml(file)
    if "compare" in tables:
        assert compare.plan(file)
    if "pretraining" in tables:
        assert pretraining_tables(file, {})[1] == tables["pretraining"]
        Pretraining(**tables["pretraining"])
    if not {"compare", "pretraining"} & set(tables):
        parse(file)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_a_page(name: str) -> None:
    """Its page names it and documents each setting that its class adds to the common ones."""
    page = (ROOT / "docs" / "algorithms" / f"{ALGORITHMS[name].page}.md").read_text()
    common = set() if name == "fedavg" else {field.name for field in dataclasses.fields(FedAvg)}
    settings = {field.name for field in dataclasses.fields(ALGORITHMS[name].cls)} - common
    documented = {row.split(".")[0] for row in re.findall(r"^\| `(\w+(?:\.\w+)?)` \|", page, re.M)}
    assert f"`{name}`" in page
    assert settings - documented == set()


def test_every_page_is_an_algorithms() -> None:
    pages = {page.stem for page in INDEX.parent.glob("*.md") if page != INDEX}
    assert pages == {entry.page for entry in ALGORITHMS.values()}


def test_the_index_of_algorithms_names_every_page() -> None:
    named = re.findall(r"\]\(([\w-]+\.md)\)", INDEX.read_text())
    assert sorted(named) == sorted(page.name for page in INDEX.parent.glob("*.md") if page != INDEX)


def test_the_citation_and_the_package_name_one_version() -> None:
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited
    assert cited.group(1) == __version__


def test_every_dependency_has_its_tested_version() -> None:
    def name(requirement: str) -> str:
        return re.split(r"[^\w.-]", requirement)[0].lower()

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {name(line): line for line in lines if line and not line.startswith("#")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {extra: named for extra, named in project["optional-dependencies"].items() if extra != "data"}
    required = {name(each) for group in (project["dependencies"], *extras.values()) for each in group}
    assert required - pinned.keys() == set()
    assert [line for line in pinned.values() if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def test_the_data_page_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    """Its Python runs; its commands and tables name settings that there are, of the right types."""
    blocks = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.S)
    commands, tables = 0, 0
    for kind, text in blocks:
        if kind == "python":
            exec(text, {})
            assert "a photo of the digit three" in capsys.readouterr().out
        settings = tomllib.loads(text).get("data", {}) if kind == "toml" and "[" in text.splitlines()[0] else {}
        options = dict(settings.get("options", tomllib.loads(text) if kind == "toml" else {}))
        if options:
            tables += 1
            check(settings.get("source", "npz"), options)
        for line in text.splitlines() if kind == "" else ():
            if line.startswith("warmfed data"):
                commands += 1
                asked = parser().parse_args(line.split()[1:])
                chosen = data_table(asked.config and ROOT / asked.config, dict(setting(each) for each in asked.settings))
                check(chosen.source, dict(chosen.options))
    assert (commands, tables) == (10, 5)


def check(source: str, options: dict[str, object]) -> None:
    """Raises where a reader does not take these options; the path is the only thing that it may miss."""
    with pytest.raises(InputError, match=r"no/such|install it by"):
        load(source, "/no/such", **options)


def test_the_page_on_bases_is_true() -> None:
    """Its commands parse, its configurations are there, and its tables name settings that there are."""
    text = (ROOT / "docs" / "stable-diffusion.md").read_text()
    commands = re.findall(r"^warmfed (.+)$", text, re.M)
    for command in commands:
        asked = parser().parse_args(command.split())
        assert (ROOT / asked.config).is_file()
    tables = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", text, re.S)]
    for table in tables:
        resolve(table)
    rows = re.findall(r"^\| (`[^|]+) \|", text, re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    known = {field.name for cls in (LatentDiffusion, Synthesis) for field in dataclasses.fields(cls)}
    assert named - known == set()
    assert (len(commands), len(tables), len(named) > 8) == (2, 2, True)


def test_each_claim_of_the_threat_model_has_its_test() -> None:
    claims = re.findall(r"`(tests[\w/]*/test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "security.md").read_text())
    assert len(claims) > 15
    for path, name in claims:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
