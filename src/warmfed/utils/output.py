"""Standard output and error of the commands: closed, full, or of an encoding that lacks a character."""

import codecs
import io
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

ERRORS = "warmfed.replace"
"""Name of the error handler for characters that an encoding lacks."""
_PLAIN = {"–": "-", "—": "-", "−": "-", "…": "...", "×": "x", "★": "*", "≥": ">=", "≤": "<=", "“": '"', "”": '"', "’": "'"}


class OutputError(Exception):
    """The output cannot be written; the text says how to finish the work."""


def prepare_output() -> None:
    """Make standard output and error take any text, and let no file have their descriptors if they are closed."""
    codecs.register_error(ERRORS, _replaced)
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            while os.open(os.devnull, os.O_RDWR) < number:  # the system gives the lowest descriptor that is free
                pass
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="replace"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERRORS)
    _watch(sys.stdout)


def _watch(stream: Any) -> None:
    """Keep the error of a stream that cannot be written; it may drop the text, so that a later `flush` raises nothing."""
    if not isinstance(stream, io.TextIOWrapper) or "warmfed_fault" in vars(stream):
        return

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            try:
                return method(*arguments)
            except OSError as error:
                watching.warmfed_fault = error
                raise

        return call

    watching: Any = stream
    watching.warmfed_fault = None
    watching.write, watching.flush = watched(stream.write), watched(stream.flush)


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return what replaces the first character that the encoding lacks, and the place after it.

    A byte of a file name that is not UTF-8 is written as it is, so that other programs can open the file.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return _PLAIN.get(character, "?"), error.start + 1


def output_fails() -> OSError | None:
    """Return the error of standard output if what was printed cannot be written; None if all is written."""
    try:
        sys.stdout.flush()
    except ValueError:  # closed
        return None
    except OSError as error:
        return error
    fault: OSError | None = getattr(sys.stdout, "warmfed_fault", None)
    return fault


def discard(stream: TextIO) -> None:
    """Write nothing more to a stream that takes nothing, not even at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):
        return


def complain(line: str) -> None:
    """Print a line to standard error, if it takes one."""
    _print(line, sys.stderr)


def announce(line: str) -> None:
    """Print a line to standard output, if it takes one; for servers, which go on without it."""
    _print(line, sys.stdout)


def _print(line: str, stream: TextIO) -> None:
    try:
        print(line, file=stream, flush=True)
    except UnicodeError:
        _print(line.encode("ascii", "backslashreplace").decode(), stream)
    except OSError:
        discard(stream)
