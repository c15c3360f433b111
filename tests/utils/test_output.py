"""Output that cannot take a text: of another encoding, closed or full."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warmfed.utils.errors import InputError, demand_text, printable, shown
from warmfed.utils.output import announce, complain, discard, output_fails, prepare_output

ANY = st.text(st.characters(codec=None, categories=None), max_size=40)


def written(text: str, encoding: str) -> bytes:
    """Return what printing writes to a standard output of this encoding."""
    held = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(held, encoding, newline=""))
        prepare_output()
        sys.stdout.write(text)
        assert output_fails() is None
        return held.getvalue()


@settings(max_examples=60, deadline=None)
@given(ANY, st.sampled_from(["ascii", "cp1252", "utf-8", "latin-1"]))
def test_any_text_can_be_written_in_any_encoding(text: str, encoding: str) -> None:
    found = written(text, encoding).decode(encoding, "surrogateescape")
    for character in text:
        try:
            character.encode(encoding)
        except UnicodeError:
            continue
        assert character in found


@pytest.mark.parametrize(
    ("text", "encoding", "expected"),
    [
        ("–1 … 犬★", "ascii", b"-1 ... ?*"),
        ("é–犬", "cp1252", b"\xe9\x96?"),
        ("caf\udce9", "utf-8", b"caf\xe9"),
        ("\ud800", "utf-8", b"?"),
    ],
)
def test_what_an_encoding_lacks_is_replaced(text: str, encoding: str, expected: bytes) -> None:
    assert written(text, encoding) == expected


@settings(max_examples=100, deadline=None)
@given(ANY)
def test_shown_text_is_safe_and_keeps_what_is_printable(text: str) -> None:
    for found in (shown(text).replace("\n", ""), printable(text)):
        assert found.isprintable()
        found.encode()
    if text.isprintable():
        assert shown(text) == text
    assert [c for c in shown(text) if c.isprintable() and c in text] or not any(c.isprintable() for c in text)
    assert shown("caf\udce9\x1b[0m\u202e:smile:") == "caf\\xe9[0m:smile:"


def test_text_that_is_not_utf8_is_refused() -> None:
    demand_text("犬 é", "a name")
    with pytest.raises(InputError, match=r"a name is not UTF-8: caf\\xe9; write"):
        demand_text("caf\udce9", "a name")


def test_a_full_output_is_found_even_if_the_text_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("the system has no device that is always full")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        prepare_output()
        with pytest.raises(OSError, match="No space left"):
            print("x", flush=True)
        fault = output_fails()
        assert fault is not None
        announce("a server goes on")
        discard(full)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        complain("nobody reads this")


def test_no_file_gets_the_descriptor_of_a_closed_output(tmp_path: Path) -> None:
    code = """if True:
        import os, sys
        from warmfed.utils.output import prepare_output
        prepare_output()
        print("lost"); print("lost", file=sys.stderr)
        assert os.open("file", os.O_CREAT | os.O_WRONLY) > 2
    """
    closed = "import os, sys; [os.close(n) for n in (0, 1, 2)]; os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])"
    done = subprocess.run([sys.executable, "-c", closed, code], cwd=tmp_path, env=os.environ | {"PYTHONNOUSERSITE": "1"})
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""
