"""The audit log of the data that a site has sent."""

import json
from pathlib import Path

import pytest
import tiny

from warmfed.cli.parser import main
from warmfed.core.messages import digest, encode
from warmfed.deploy.ledger import read, tables
from warmfed.deploy.site import answer
from warmfed.runs.execute import execute
from warmfed.transports.protocol import Answer, Request, opened
from warmfed.utils.errors import InputError
from warmfed.utils.files import write_lines


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site's folder; it has presented itself, and refused a request."""
    folder = tmp_path / "a"
    folder.mkdir()
    data = tiny.arrays(tmp_path / "toy.npz")
    rules = 'algorithms = ["fedavg-finetune"]\nmax_runs = 1\nmax_requests = 9\nmax_bytes = 1_000_000'
    (folder / "site.toml").write_text(f'name = "a"\ndata.source = "{data}"\n[policy]\n{rules}\n')
    config = tiny.config(data).toml()
    for name, stage in (("", "hello"), ("b", "train")):
        answer(folder, encode(Request("0123456789abcdef", name, config, stage, 0, 0, None)))
    return folder


def test_the_ledger_of_a_site(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = read(site)
    assert (ledger.site, [line["kind"] for line in ledger.lines]) == ("a", ["wire.Card", "wire.Refusal"])
    overview, contents, every, refused, rules = tables(ledger)
    assert [cell.text for cell in overview.rows[0]][:2] == ["wire.Card", "1"]
    assert overview.rows[0][3].text.startswith("Description of a site")
    named = {(row[0].text, row[1].text): row[2].text for row in contents.rows}
    assert named["classes", "wire.Card"] == "texts"
    assert named["rows", "wire.Card"] == "numbers by name"
    assert every.rows[0][7].text == ledger.lines[0]["sha256"]
    (row,) = ([cell.text for cell in row][1:] for row in refused.rows)
    assert row == ["0123456789abcdef", "fedavg-finetune", "train", "the request is for site 'b', this is 'a'"]
    said = {row[0].text: row[1].text for row in rules.rows}
    assert (said["algorithms"], said["images"], said["max_bytes"]) == ("fedavg-finetune", "no", "1,000,000")
    assert main(["site-report", str(site), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["site"], told["bytes"], len(told["messages"])) == ("a", sum(line["bytes"] for line in ledger.lines), 2)
    assert main(["site-report", str(site)]) == 0
    assert "the request is for site 'b', this is 'a'" in capsys.readouterr().out


def test_the_page_loads_nothing_and_shows_what_came_as_text(site: Path, tmp_path: Path) -> None:
    path = site / "work" / "ledger.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [*lines, lines[0] | {"tensors": {"<script>x</script>": ["float32", [2, 3]]}}])
    assert main(["site-report", str(site), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Messages sent by site a" in page
    assert "2 × 3" in page
    assert "Refused requests" in page
    assert "this is &#39;a&#39;" in page or "this is 'a'" in page
    assert "fedavg-finetune" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_bytes_and_hash_are_those_that_left(site: Path) -> None:
    data = tiny.config(site.parent / "toy.npz").toml()
    asked = Request("0123456789abcdef", "", data, "hello", 0, 0, None)
    came = opened(answer(site, encode(asked)), asked, None, object)
    assert isinstance(came, Answer)
    body = encode(came.body)
    last = read(site).lines[-1]
    assert (last["bytes"], last["sha256"]) == (len(body), digest(body))


def test_the_ledger_of_a_run_on_one_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny.arrays(tmp_path / "toy.npz")
    execute(tiny.config(data), tmp_path / "run")
    ledger = read(tmp_path / "run", "b")
    assert [line["stage"] for line in ledger.lines] == ["train", "personalize"]
    assert tables(ledger)[0].rows[0][0].text == "averaging.Model"
    assert "not named here" in [row[2].text for row in tables(ledger)[1].rows]
    assert main(["site-report", str(tmp_path / "run"), "--site", "b"]) == 0
    assert ledger.lines[0]["sha256"] in capsys.readouterr().out
    with pytest.raises(InputError, match="set --site to one of: a, b"):
        read(tmp_path / "run")


@pytest.mark.parametrize("text", ["{", '["no table"]\n', '{"stage": "train"}\n'])
def test_a_damaged_ledger_is_refused(text: str, site: Path) -> None:
    (site / "work" / "ledger.jsonl").write_text(text)
    with pytest.raises(InputError, match="damaged"):
        read(site)


def test_a_site_that_sent_nothing_and_a_folder_that_is_none(site: Path, tmp_path: Path) -> None:
    (site / "work" / "ledger.jsonl").unlink()
    assert read(site).lines == ()
    assert tables(read(site))[2].rows == ()
    for folder, name in ((tmp_path, "a"), (site, "b")):
        with pytest.raises(InputError):
            read(folder, name)
