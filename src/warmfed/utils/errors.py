"""The one error a user can cause, and what its text may hold: what was expected, what came, what to do."""


class InputError(ValueError):
    """Bad input from outside (configuration, data, adapter, message, checkpoint).

    The command line prints it as one line and exits with code 2; nothing has been changed when it is raised.
    """


def suggest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """'; did you mean X?' for the nearest of `known`, or the list of what is known."""
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"


def printable(text: str, limit: int = 300) -> str:
    """Return text from outside as one line that may be printed, logged or recorded.

    Args:
        text: what a site (or a file) has sent.
        limit: the most characters to return; a longer text ends in "…".

    Returns:
        The text without control, format, surrogate and other unprintable characters; any white space is one space.
    """
    cut = text[: 2 * limit + 2]  # a text may be as long as a message
    line = " ".join("".join(c for c in cut if c.isprintable() or c.isspace()).split())
    return line if len(line) <= limit and len(cut) == len(text) else f"{line[: limit - 1]}…"
