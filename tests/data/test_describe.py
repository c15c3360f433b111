"""The plot of a federation's counts: names are text, whatever signs they have."""

import warnings
from pathlib import Path

import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from warmfed.data import Federation, Site
from warmfed.data import describe as described
from warmfed.utils.errors import InputError


def federation(*classes: str, sites: tuple[str, ...] = ("a", "b")) -> Federation:
    tables = {name: Site(*(toy.table(0, split, 6) for split in ("train", "validation", "test"))) for name in sites}
    return Federation("toy $x$", classes, "a {}", tables)


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    names = ("_first", r"under $\frac$", "50 % 犬")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for suffix in ("png", "svg"):
            described.plot(federation(*names, sites=("_a", "$x^$ 犬")), tmp_path / f"plot.{suffix}")
            assert (tmp_path / f"plot.{suffix}").stat().st_size > 1000
    with pytest.raises(InputError, match=r"a file that ends in \.png"):
        described.plot(federation(*names), tmp_path / "plot.doc")


@settings(max_examples=10, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=9), min_size=3, max_size=3, unique=True))
def test_every_class_has_its_label(names: list[str]) -> None:
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    described._bars(axes, [(name, [1, 2]) for name in names], "tab20", "title", legend=True)
    found = [text.get_text() for text in figure.legends[0].get_texts()]
    assert found == [described.printable(name, 60) for name in names]
