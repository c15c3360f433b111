"""Names of sites and classes from files, tables and the command line: one form for each, remarks on lookalikes."""

import re
import unicodedata
from collections.abc import Iterable

from .errors import InputError, is_utf8

_MISSING = {"nan", "none", "null", "nil", "na", "n/a", "<na>", "nat", "undefined"}
_WHOLE = re.compile(r"(?<![\d.])0*(\d+)(?:\.0+)?(?![\d.])")
_BETWEEN = re.compile(r"(?<=\w)[\s_-]+(?=\w)")


def plain_name(name: str) -> str:
    """Return a name in Unicode's composed form (NFC), without blanks at its ends and with single blanks between its words.

    Linux and Windows keep names composed, macOS has kept them decomposed; tables have blanks around their cells.
    """
    return " ".join(unicodedata.normalize("NFC", name).split())


def plain_names(names: Iterable[str], what: str) -> tuple[str, ...]:
    """Return the plain forms of a list of names.

    Args:
        names: the names.
        what: name of the list, for errors.

    Raises:
        InputError: A name is empty, or occurs twice.
    """
    given = list(names)
    if strange := [name for name in given if not isinstance(name, str)]:
        raise InputError(f"{what} must be a list of texts; got {strange[0]!r}, write it in quotation marks")
    found = [plain_name(name) for name in given]
    for place, name in enumerate(found):
        if not name:
            raise InputError(f"{what} has an empty name at place {place + 1}; remove the extra comma or name it")
        if name in found[:place]:
            raise InputError(f"{what} names {name!r} twice; remove one")
    return tuple(found)


def fault_of_name(name: str) -> str:
    """Return why a name cannot be used, as the end of a sentence; empty if it can be."""
    if not name.strip():
        return "is empty; give it a name"
    if not is_utf8(name):
        return "is not valid UTF-8, as in archives of some old systems; rename it"
    return "" if name == plain_name(name) else "has blanks at its ends or is not in Unicode's form NFC; rename it"


def lookalikes(names: Iterable[str], what: str, why: str) -> list[str]:
    """Return remarks on different names that people may take for one, and on names that stand for a missing value.

    Two names look alike if they differ in case, in width or invisible letters, in leading zeros, or in what joins their words.

    Args:
        names: the names.
        what: plural of the named things, such as "classes".
        why: what to do, such as "if they are one class, give them one name".
    """
    alike: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        alike.setdefault(_key(name), []).append(name)
    found = [f"the {what} {', '.join(map(repr, group))} look alike; {why}" for group in alike.values() if len(group) > 1]
    absent = [name for group in alike.values() for name in group if name.casefold() in _MISSING]
    if absent:
        found.append(f"{', '.join(map(repr, absent))} among the {what} may stand for a missing value; check the data")
    return found


def _key(name: str) -> str:
    visible = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    return _BETWEEN.sub(" ", _WHOLE.sub(r"\1", visible.casefold()))
