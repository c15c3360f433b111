"""Data of the pre-training: public images, and the captions of each class."""

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import prompts_of
from ..core.rng import stream
from ..core.tensors import Table, Tensors, select, sha256
from ..data import SPLITS, Federation
from ..data.rendered_digits import rendered
from ..diffusion.prompt_check import Reader, difference, equal
from ..utils.errors import InputError, printable

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the digit {word}", "a photo of the digit {word}", "a photo of a {word}", "a picture of the digit {word}",
    "an image of the number {word}", "the digit {word}", "{word}", "a photo of the digit {numeral}",
    "a picture of a {numeral}", "a handwritten {numeral}", "a drawing of the number {word}", "{numeral}",
)  # fmt: skip
"""Captions of a digit; the first one is twice as frequent."""
TOKENS = 16
"""Maximum number of tokens of a text; longer texts are cut."""

Captions = tuple[tuple[str, ...], ...]
"""Captions of each class, equally many for each."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A user's own images, instead of rendered digits."""

    table: Table
    """Images and labels: {"image": uint8 [n, 3, h, w], "label": int64 [n]}."""
    classes: tuple[str, ...]
    """Class names."""
    captions: Captions
    """Captions of each class."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Description of the images in `pretraining.json`."""
        return {"images": len(self.table["label"]), "classes": list(self.classes), "sha256": sha256(self.table)}


def digits(characters: str) -> Captions:
    """Return the captions of digits."""
    return tuple(tuple(template.format(word=WORDS[int(c)], numeral=c) for template in TEMPLATES) for c in characters)


def drawn(characters: str, count: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Return a table of rendered digits; the labels are positions in `characters`."""
    numbers = [int(character) for character in characters]
    table = rendered(count, rng, numbers)
    place = torch.zeros(10, dtype=torch.int64)
    place[numbers] = torch.arange(len(numbers))
    return {"image": table["image"], "label": place[table["label"]]}


def pictures(federation: Federation, side: int) -> ImageSet:
    """Return the public images of a federation; if it has none, all its images are public.

    The order is random, since folders are ordered by class. The captions of a class are its prompt (twice as often), its
    name, and the name in three common phrases.

    Raises:
        InputError: if the images are grey, or their side is not `side` pixels.
    """
    if federation.shape != (3, side, side):
        raise InputError(
            f"expected colour images of {side}×{side} pixels, got {federation.shape} from {federation.name}; "
            f"set data.options.image_size={side} (or `side`) and channels=3"
        )
    tables: list[Tensors] = [each.splits[part] for each in federation.sites.values() for part in SPLITS]
    tables = [federation.public] if federation.public is not None else tables
    table = {column: torch.cat([each[column] for each in tables]) for column in ("image", "label")}
    order = torch.randperm(len(table["label"]), generator=stream("pretrain", "pictures"))
    captions = []
    for name, prompt in zip(federation.classes, prompts_of("", federation.prompts), strict=True):
        word = name.replace("_", " ")
        captions.append((prompt, prompt, word, f"a photo of a {word}", f"a picture of a {word}", f"an image of {word}"))
    return ImageSet(select(table, order), federation.classes, tuple(captions))


def check_captions(classes: Sequence[str], captions: Captions) -> None:
    """Raise `InputError` if a caption of a class has the same tokens as one of another class."""
    using = (Reader(tokenizer(captions)),)
    texts = [text for row in captions for text in row]
    owners = [label for label, row in enumerate(captions) for _ in row]
    if pair := equal(using, texts, owners):
        one, two = pair
        raise InputError(
            f"classes {printable(classes[owners[one]], 60)!r} and {printable(classes[owners[two]], 60)!r} have a caption with "
            f"equal tokens: {difference(using, texts[one], texts[two])}"
        )


def mirrored(table: Tensors) -> dict[str, Tensor]:
    """Return the images and their mirror images."""
    return {"image": torch.cat([table["image"], table["image"].flip(-1)]), "label": table["label"].repeat(2)}


def tokenizer(captions: Captions) -> Any:
    """Return a `CLIPTokenizer` with the captions' words of Latin letters, and all characters of ASCII.

    Any other letter becomes the unknown token, which is also the token of the end.
    """
    from transformers import CLIPTokenizer

    words = _words(text for texts in captions for text in texts)
    words += ["character", "figure", "letter", "printed", "written", "in", "on", "with", "and", "small", "large"]
    symbols = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [symbol + end for symbol in symbols for end in ("", "</w>")]
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        head = word[0]
        for symbol in [*word[1:-1], word[-1] + "</w>"][: len(word) - 1]:
            merges[head, symbol] = None
            head += symbol
            pieces.append(head)
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocabulary, list(merges), model_max_length=TOKENS)


def _words(texts: Iterable[str]) -> list[str]:
    """Return the words that the tokenizer finds in texts: runs of letters, and single numerals."""
    return sorted({word for text in texts for word in re.findall(r"[a-z]+|[0-9]", text.lower())})
