"""Text from outside is printed as one line of bounded length."""

import pytest

from warmfed.utils.errors import printable


@pytest.mark.parametrize(
    ("text", "limit", "line"),
    [
        ("as it is", 300, "as it is"),
        ("\x1b[2J\x1b]0;owned\x07red", 300, "[2J]0;ownedred"),
        ("two\r\nlines\tand\x00 more", 300, "two lines and more"),
        ("\u202eright to left\u2066 \ud800", 300, "right to left"),
        ("", 300, ""),
        ("x" * 10, 10, "x" * 10),
        ("x" * 11, 10, "x" * 9 + "…"),
        (" " * 10**6 + "late", 10, "…"),
    ],
)
def test_a_text_from_outside_is_one_bounded_line(text: str, limit: int, line: str) -> None:
    found = printable(text, limit)
    assert found == line
    assert found.isprintable()
    found.encode()
