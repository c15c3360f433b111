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


def printable(text: str, limit: int = 300) -> str:
    """Return untrusted text as one line that is safe to print, log or record.

    Args:
        text: text from a site or a file.
        limit: largest number of characters to return; a longer text ends in "…".

    Returns:
        The text without control, format, surrogate and other unprintable characters; any white space is one space.
    """
    cut = text[: 2 * limit + 2]  # a text may be as large as a message
    line = " ".join("".join(c for c in cut if c.isprintable() or c.isspace()).split())
    return line if len(line) <= limit and len(cut) == len(text) else f"{line[: limit - 1]}…"
