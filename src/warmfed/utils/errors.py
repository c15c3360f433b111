"""The error for invalid input. Its text says what failed, what was expected, what came, and how to fix it."""


class InputError(ValueError):
    """Invalid input: configuration, data, adapter, message or checkpoint.

    The command line prints it as one line and exits with code 2. Nothing is changed before it is raised.
    """


def suggest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Return '; did you mean X?' with the nearest word of `known`, or the list of known words."""
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"


def is_utf8(text: str) -> bool:
    """Return whether a text can be stored as UTF-8; bytes of names in another encoding cannot."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def demand_text(text: str, what: str) -> None:
    """Raise `InputError` if a text cannot be stored as UTF-8, as of a command line or file name in another encoding.

    Args:
        text: the text.
        what: what the text is, for the error.
    """
    if not is_utf8(text):
        raise InputError(f"{what} is not UTF-8: {printable(text, 80)}; write it in UTF-8")


def shown(text: str) -> str:
    """Return untrusted text as lines that are safe to print, log or record.

    Returns:
        The text without control, format and other unprintable characters, except line feeds. White space is a space. A byte
        of a file name that is not UTF-8 is shown as `\\xe9`.
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(c: str) -> str:
    if c.isprintable() or c == "\n":
        return c
    return f"\\x{ord(c) - 0xDC00:x}" if "\udc80" <= c <= "\udcff" else " " * c.isspace()


def printable(text: str, limit: int = 300) -> str:
    """Return untrusted text as one line that is safe to print, log or record.

    Args:
        text: text from a site or a file.
        limit: largest number of characters to return; a longer text ends in "…".

    Returns:
        The text as of `shown`; any white space is one space.
    """
    cut = text[: 2 * limit + 2]  # a text may be as large as a message
    line = " ".join(shown(cut).split())
    return line if len(line) <= limit and len(cut) == len(text) else f"{line[: limit - 1]}…"
