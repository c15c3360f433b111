"""Prompts of the classes: a template's placeholders filled in for a class and a site."""

import re
from collections.abc import Sequence

_SITE = re.compile(r"\{site((?:\|[^|={}]+=[^|={}]+)*)\}")


def prompt(template: str, name: str) -> str:
    """Return the prompt of a class.

    The name replaces `{}`, and the name with spaces for underscores replaces `{class}`. `prompts_of` replaces `{site}`.
    """
    return template.replace("{}", name).replace("{class}", name.replace("_", " "))


def prompts_of(site: str, prompts: Sequence[str]) -> tuple[str, ...]:
    """Return a site's prompts: its name replaces `{site}`.

    `{site|real=photo|quickdraw=doodle}` gives the word of single sites. Without a site (""), the word is "photo".
    """

    def word(found: re.Match[str]) -> str:
        given = dict(pair.split("=", 1) for pair in found[1].split("|")[1:])
        return given.get(site, site.replace("_", " ") or "photo")

    return tuple(_SITE.sub(word, text) for text in prompts)
