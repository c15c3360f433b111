"""Check that a base's tokenizers give each class other tokens: it cannot draw two classes with equal tokens apart."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.errors import InputError, printable
from ..utils.paths import children
from . import known_pipelines, pipeline
from .pipeline_families import ids

_MOST = 2**31


@dataclass(frozen=True)
class Reader:
    """A tokenizer of a base, as the base uses it."""

    tokenizer: Any
    """Tokenizer of transformers."""
    most: int = _MOST
    """Most tokens that its text encoder takes."""
    rows: Callable[[Any, Sequence[str], int], Tensor] = ids
    """`Family.rows` of the base."""

    def read(self, texts: Sequence[str]) -> Tensor:
        """Return the token numbers of texts, int64 [n, length], cut to the length of the base."""
        return self.rows(self.tokenizer, texts, self.most)

    def whole(self, text: str) -> list[int]:
        """Return the token numbers of a text, not cut and without the tokens of its beginning and end."""
        return list(self.tokenizer(text.lower().strip(), add_special_tokens=False, truncation=False, verbose=False).input_ids)


def readers(base: str) -> tuple[Reader, ...]:
    """Return the tokenizers of a base; none if it is a known pipeline without files.

    Raises:
        InputError: The base neither exists nor is known, or a tokenizer is damaged.
    """
    try:
        folder = pipeline.find(base, weights=False)
    except InputError:
        if base.partition("@")[0] not in known_pipelines.KNOWN:
            raise
        return ()
    kind = pipeline.index_of(folder)[0]
    found = []
    for part, encoder in kind.readers:
        most = pipeline.json_of(folder / encoder / "config.json").get("max_position_embeddings", _MOST)
        found.append(Reader(tokenizer(folder, part), most, kind.rows))
    return tuple(found)


def tokenizer(folder: Path, part: str) -> Any:
    """Return a tokenizer of a base, loaded once per process while its files stay as they are.

    Args:
        folder: folder of the base, from `find`; the weights need not exist.
        part: folder of the tokenizer.

    Raises:
        InputError: The tokenizer does not load.
    """
    stamp = tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in children(folder / part))
    return _tokenizer(folder, part, stamp)


@functools.lru_cache(maxsize=8)
def _tokenizer(folder: Path, part: str, stamp: tuple[tuple[str, int, int], ...]) -> Any:
    pipeline.quiet()
    return pipeline.load_part(folder, part, pipeline.index_of(folder)[1])


def check_prompts(base: str, classes: Sequence[str], prompts: Mapping[str, Sequence[str]]) -> None:
    """Raise `InputError` if two classes have equal tokens at a site, in all tokenizers of the base.

    Args:
        base: name or folder of the base; without its files, a known one is not checked.
        classes: names of the classes.
        prompts: one prompt per class, by site.
    """
    using = readers(base)
    first: dict[tuple[str, ...], str] = {}
    for site, texts in prompts.items():
        first.setdefault(tuple(texts), site)
    for texts, site in first.items() if using else ():
        if pair := equal(using, texts, range(len(texts))):
            one, two = (printable(classes[place], 60) for place in pair)
            where = f" at site {site!r}" if site and len(first) > 1 else ""
            raise InputError(
                f"classes {one!r} and {two!r} have the same prompt for the base {base}{where}: "
                f"{difference(using, *(texts[place] for place in pair))}, or set another generator.base"
            )


def equal(using: Sequence[Reader], texts: Sequence[str], owners: Sequence[int]) -> tuple[int, int] | None:
    """Return the places of the first two texts of different owners that have equal tokens in all readers, if there are any."""
    seen: dict[tuple[int, ...], int] = {}
    for place, row in enumerate(torch.cat([reader.read(texts) for reader in using], 1).tolist()):
        before = seen.setdefault(tuple(row), place)
        if owners[before] != owners[place]:
            return before, place
    return None


def difference(using: Sequence[Reader], one: str, two: str) -> str:
    """Return why two texts have equal tokens, and what to do: the cut, unknown letters, or what the tokenizer ignores."""
    texts = f"{printable(one, 80)!r} and {printable(two, 80)!r}"
    for reader in using:
        most, (first, second) = reader.read([one]).shape[1], (reader.whole(one), reader.whole(two))
        if first != second and _common(first, second) >= most - 2:
            return f"it reads {most} tokens, and {texts} differ only after this cut; shorten data.options.template or the names"
    for reader in using:
        unknown = [letter for letter in dict.fromkeys(one + two) if reader.tokenizer.unk_token_id in reader.whole(letter)]
        if unknown:
            letters = printable(" ".join(unknown), 40)
            return f"the letters {letters} of {texts} are not in its vocabulary; rename the classes with the letters a to z"
    return f"{texts} differ only in what its tokenizer ignores, such as capital letters or blanks; rename the classes"


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """Return the number of equal tokens at the beginning of two texts."""
    return next((place for place, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
