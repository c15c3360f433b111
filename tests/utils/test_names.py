"""Names of sites and classes: one form for each, and remarks on names that look alike."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmfed.utils.errors import InputError
from warmfed.utils.names import fault_of_name, lookalikes, plain_name, plain_names


@given(st.text())
def test_a_plain_name_is_its_own_plain_form(name: str) -> None:
    found = plain_name(name)
    assert plain_name(found) == found
    assert plain_name(f"\t {unicodedata.normalize('NFD', name)}\n") == found
    if found:
        assert fault_of_name(found) in ("", "is not valid UTF-8, as in archives of some old systems; rename it")


@pytest.mark.parametrize(
    "pair", [("Cat", "cat"), ("1", "01"), ("1.0", "1"), ("site 2", "site_02"), ("a\u200bb", "ab"), ("ﬁn", "fin")]
)
def test_names_that_look_alike_are_named(pair: tuple[str, str]) -> None:
    (told,) = lookalikes([*pair, "other"], "classes", "check")
    assert all(repr(name) in told for name in pair)


@pytest.mark.parametrize("names", [("1", "10"), ("1.5", "1"), ("v1.0.2", "v1.2"), ("cat", "cats"), ("a-b", "ab"), ("-1", "1")])
def test_other_names_do_not(names: tuple[str, str]) -> None:
    assert lookalikes(names, "classes", "check") == []


def test_a_missing_value_is_named() -> None:
    (told,) = lookalikes(["cat", "NaN", "None"], "classes", "check")
    assert told.startswith("'NaN', 'None' among")


@pytest.mark.parametrize(("names", "told"), [(["a", " "], "empty name at place 2"), (["a", " a"], "names 'a' twice")])
def test_lists_with_faults(names: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        plain_names(names, "--classes")


def test_names_that_cannot_be_used() -> None:
    assert "not valid UTF-8" in fault_of_name("caf\udce9")
    assert "empty" in fault_of_name(" ")
    assert "blanks" in fault_of_name(" a")
