"""Names from files and sites on the console: literal, on one line, without control characters."""

import io
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warmfed.config import parse
from warmfed.report.parts import Cell, Table
from warmfed.runs.console import BarReporter, LineReporter, PlainTable, console, data_counts, one_line, print_path, rich_table
from warmfed.utils.output import prepare_output

NAMES = st.text(st.characters(codec=None, categories=None), min_size=1, max_size=12)
HOSTILE = "[red]a[/b] <b> $x$ :smile: |`=1+1"


def drawn(draw: object, encoding: str = "utf-8", *, terminal: bool = False) -> str:
    """Return what draw() prints to a standard output of this encoding."""
    held = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        stream = io.TextIOWrapper(held, encoding, newline="")
        if terminal:
            stream.isatty = lambda: True  # type: ignore[method-assign]
        patch.setattr(sys, "stdout", stream)
        prepare_output()
        draw()  # type: ignore[operator]
        sys.stdout.flush()
    return held.getvalue().decode(encoding, "surrogateescape")


def names_table(name: str) -> None:
    table = PlainTable(name, box=None)
    table.add_row(name)
    console().print(table)
    console().print(rich_table(Table(name, (name, "b"), ((Cell(name), Cell(name, best=True)),))))
    counts = {name: {"train": [1, 2]}}
    console().print(data_counts({"classes": [name, "b"], "sites": counts}))


@settings(max_examples=40, deadline=None)
@given(NAMES, st.sampled_from(["ascii", "utf-8", "cp1252"]))
def test_any_name_can_be_in_a_table(name: str, encoding: str) -> None:
    found = drawn(lambda: names_table(name), encoding)
    lines = [line for line in found.split("\n") if line.strip()]
    assert len(lines) <= 7  # no name adds a line
    if encoding == "utf-8" and name.isprintable():
        assert name.strip() in found


@pytest.mark.parametrize("terminal", [False, True])
def test_markup_is_printed_as_it_is(terminal: bool) -> None:
    found = drawn(lambda: names_table(HOSTILE), terminal=terminal)
    assert found.count(HOSTILE) >= 6


@settings(max_examples=20, deadline=None)
@given(NAMES)
def test_any_name_can_be_in_the_progress(name: str) -> None:
    config = parse(None, {"algorithm.name": "fedavg", "algorithm.rounds": 1})

    def report() -> None:
        for reporter in (LineReporter(), BarReporter()):
            with reporter:
                reporter.plan(Path(name), config, (name, "b"), ())
                reporter.progress(name, name, 1, 2)
                reporter.progress("", name, 1, 2)
                reporter.say(name)
                reporter.phase(name, 1, 1)

    found = drawn(report, terminal=True)
    assert one_line(found).count(one_line(name).strip()) >= 2  # said, and as a phase


@pytest.mark.parametrize(
    "variable",
    ["COLUMNS=0", "COLUMNS=10", "COLUMNS=²", "COLUMNS=-3", "LINES=²", "LINES=0", "TERM=dumb", "TERM=?", "NO_COLOR=1"],
)
def test_odd_terminals(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*variable.split("="))
    for terminal in (False, True):
        assert "d" in drawn(lambda: names_table("d"), terminal=terminal)


def test_a_path_is_exact_for_programs_and_safe_on_a_terminal() -> None:
    assert drawn(lambda: print_path(Path("caf\udce9\x1b[0m"))) == "caf\udce9\x1b[0m\n"
    assert drawn(lambda: print_path(Path("caf\udce9\x1b[0m")), terminal=True) == "caf\\xe9[0m\n"
