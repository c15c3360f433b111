"""Damaged and odd files for every reader: the result is a value or one line, in bounded time and memory.

A `Target` writes sound files into a folder and reads them. `attack` changes one of them (bits, pieces, words, numbers; inside
of archives and headers, too, so that checksums still fit), reads again, and raises `BrokenError` at any other effect.
"""

import io
import json
import os
import random
import re
import resource
import shutil
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from warmfed.config import parse
from warmfed.core.rng import stream
from warmfed.data import load
from warmfed.data.image_io import UnreadableError, decode
from warmfed.diffusion import lora
from warmfed.diffusion.generator import LatentDiffusion
from warmfed.report.record import read_run
from warmfed.runs.execute import execute, resume
from warmfed.runs.folder import read_config, read_summary
from warmfed.utils.errors import InputError

SECONDS, MEGABYTES = 2.0, 500
Mutation = Callable[[random.Random, bytes], bytes]


class BrokenError(AssertionError):
    """A reader did something else than to return or to raise one line."""


@dataclass(frozen=True)
class Target:
    """A reader with sound files."""

    write: Callable[[Path], object]
    """Writes sound files into an empty folder."""
    read: Callable[[Path], object]
    """Reads the folder; raises `InputError` if a file cannot be used."""
    text: bool = False
    """Whether the changed files are text."""
    only: str = ""
    """Regular expression of the names of the files to change; empty: all."""


def _pixels(seed: int, side: int = 6) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (side, side, 3)).astype(np.uint8))


def _pictures(folder: Path) -> None:
    for suffix in ("png", "jpg", "bmp", "gif", "webp", "tif", "ppm"):
        _pixels(1).save(folder / f"a.{suffix}")
    Image.fromarray(np.arange(36, dtype=np.uint16).reshape(6, 6) * 1000).save(folder / "deep.png")
    Image.fromarray(np.arange(36, dtype=np.int32).reshape(6, 6)).save(folder / "deep.tif")
    _pixels(2).convert("P").save(folder / "palette.png", transparency=0)
    _pixels(3).save(folder / "pages.tif", save_all=True, append_images=[_pixels(4)])


def _decoded(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        try:
            decode(path, 8)
        except UnreadableError as error:
            raise InputError(str(error)) from error


def _tree(folder: Path) -> None:
    for site in "ab":
        for name in ("cat", "dog"):
            (folder / site / name).mkdir(parents=True)
            for i in range(4):
                _pixels(hash((site, name, i)) % 2**31).save(folder / site / name / f"{i}.bmp")


def _lists(folder: Path) -> None:
    _tree(folder)
    for site in "ab":
        for split, numbers in (("train", (0, 1)), ("val", (2,)), ("test", (3,))):
            lines = [f"{site}/{name}/{i}.bmp {label}" for label, name in enumerate(("cat", "dog")) for i in numbers]
            (folder / f"{site}_{split}.txt").write_text("\n".join(lines) + "\n")


def _table(folder: Path) -> None:
    _tree(folder)
    lines = [f"{s}/{n}/{i}.bmp,{n},{s},train" for s in "ab" for n in ("cat", "dog") for i in range(4)]
    (folder / "t.csv").write_text("\n".join(["image,label,site,split", *lines]) + "\n")


def _parquet(folder: Path) -> None:
    import datasets

    def cell(seed: int) -> dict[str, Any]:
        buffer = io.BytesIO()
        _pixels(seed).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    columns = {"image": [cell(i) for i in range(20)], "label": ["cat", "dog"] * 10, "site": ["a"] * 10 + ["b"] * 10}
    datasets.Dataset.from_dict(columns).to_parquet(str(folder / "t.parquet"))


def _idx(folder: Path) -> None:
    labels = (np.arange(20) % 2).astype(np.uint8)
    for seed, split in enumerate(("train", "t10k")):
        images = np.random.RandomState(seed).randint(0, 256, (20, 6, 6)).astype(np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, *images.shape) + images.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 20) + labels.tobytes())


def _toml(folder: Path) -> None:
    (folder / "c.toml").write_text(parse(None, {"algorithm.name": "fedavg", "data.options.image_size": 8}).toml())


def _adapter_target(base: str) -> Target:
    settings: dict[str, Any] = {"rank": 2, "target_modules": "attention", "prompts": False, "steps": 2}
    words = ("a photo of a cat", "a photo of a dog")

    def write(folder: Path) -> None:
        model = lora.adapted(base, words, 2, "attention", "cpu")
        fresh = lora.to_diffusers(lora.fresh(model, stream("fresh")))
        layers = {name: value for name, value in fresh.items() if ".lora_" in name}
        save_file({name: value + 0.1 for name, value in layers.items()}, folder / "site.safetensors")

    def read(folder: Path) -> None:
        LatentDiffusion(base, **settings, adapters={"ink": str(folder / "site.safetensors")}).imported("ink", words)

    return Target(write, read)


def _run_target(finished: Path, begun: Path) -> Target:
    def write(folder: Path) -> None:
        shutil.copytree(finished, folder / "finished")
        shutil.copytree(begun, folder / "begun")

    def read(folder: Path) -> None:
        problems = []
        for work in (lambda: read_run(folder / "finished"), lambda: resume(folder / "begun")):
            try:
                work()
            except InputError as error:
                problems.append(error)
        read_config(folder / "finished")
        read_summary(folder / "finished")
        if problems:
            raise problems[0]

    return Target(write, read, only=r".*\.(toml|json|jsonl|safetensors)")


def targets(root: Path) -> dict[str, Target]:
    """Return all readers by name; `root` is an empty folder for what they need."""
    cache = str(root / "cache")
    small = {"image_size": 8, "cache": cache}
    data = tiny.arrays(root / "data.npz")
    execute(tiny.config(data), root / "finished")
    tiny.interrupted(tiny.config(data), root / "begun", 4)
    found = {
        "pictures": Target(_pictures, _decoded),
        "csv": Target(_table, lambda at: load("csv", str(at / "t.csv"), site="site", **small), True, r"t\.csv"),
        "npz": Target(lambda at: tiny.arrays(at / "d.npz"), lambda at: load("npz", str(at / "d.npz"), cache=cache)),
        "idx": Target(_idx, lambda at: load("idx", str(at), cache=cache)),
        "split lists": Target(_lists, lambda at: load("folder", str(at), **small), True, r".*\.txt"),
        "toml": Target(_toml, lambda at: parse(at / "c.toml"), True),
        "adapters": _adapter_target(pipelines.write("sd15", root / "sd15")),
        "run folders": _run_target(root / "finished", root / "begun"),
    }
    try:
        import datasets
    except ImportError:
        return found
    datasets.disable_progress_bars()
    return found | {"parquet": Target(_parquet, lambda at: load("parquet", str(at), site="site", **small))}


WORDS = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xe9", "\u732b".encode(), "e\u0301".encode(), b" ", b"\t", b"\r\n", b"\n\n",
    b",", b";", b'"', b"'", b"{}", b"[", b"]]", b"\\", b"../", b"/etc/passwd", b"~nobody/x", b"nan", b"NaN", b"inf", b"-1",
    b"1e309", b"0", b"1.5", b"99999999999999999999", b"-0", b"true", b"null", b"None", b"a" * 5000, b"[" * 300, b'{"a":' * 300,
    b"\x1b[31m", "\u202e".encode(),
]  # fmt: skip


def _bits(r: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(r.choice((1, 1, 3, 20))):
        if changed:
            changed[r.randrange(len(changed))] ^= 1 << r.randrange(8)
    return bytes(changed)


def _numbers(r: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    kind = r.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
    size = struct.calcsize(kind)
    value = r.choice((0, 1, 2, 255, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), r.randrange(2 ** (8 * size))))
    if len(changed) >= size:
        # sizes stand at the beginning
        at = r.randrange(min(len(changed) - size + 1, r.choice((64, 512, len(changed)))))
        changed[at : at + size] = struct.pack(kind, value)
    return bytes(changed)


def _pieces(r: random.Random, data: bytes) -> bytes:
    a, b = sorted(r.randrange(len(data) + 1) for _ in range(2))
    return r.choice(
        (data[:a], data[a:], data[:a] + data[b:], data + data[a:b], data[:a] + data[a:b] * 2 + data[b:], data[:b] + data[a:])
    )


def _words(r: random.Random, data: bytes) -> bytes:
    places = [match.span() for match in re.finditer(rb"[\w.+-]+|[^\w\s]", data)] or [(0, 0)]
    for _ in range(r.choice((1, 1, 2, 4))):
        start, stop = r.choice(places)
        word = r.choice((*WORDS, data[slice(*r.choice(places))]))
        data = data[:start] + word + data[stop if r.random() < 0.7 else start :]
    return data


def _lines(r: random.Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True) or [b""]
    a, b = r.randrange(len(lines)), r.randrange(len(lines))
    lines[a] = r.choice((b"", lines[a] * 2, lines[b], lines[a].rstrip() + lines[b], lines[a].upper()))
    return b"".join(lines)


def _zipped(change: Mutation) -> Mutation:
    """Change a member of a zip file, whose checksum fits again."""

    def inside(r: random.Random, data: bytes) -> bytes:
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                members = {info.filename: archive.read(info) for info in archive.infolist()}
        except (zipfile.BadZipFile, ValueError, EOFError, OSError, RuntimeError, NotImplementedError, zlib.error):
            return change(r, data)  # damaged by an earlier change
        name = r.choice(sorted(members))
        members[name] = change(r, members[name])
        if r.random() < 0.2:
            members[r.choice(("domain.npy", "classes.npy", "x.npy"))] = members.pop(name)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for each, content in members.items():
                archive.writestr(each, content)
        return buffer.getvalue()

    return inside


def _header(r: random.Random, data: bytes) -> bytes:
    """Change a value, a name or a shape in the header of a safetensors file; its length fits again."""
    try:
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        name = r.choice(sorted(header))
        entry = header.pop(name)
        match r.randrange(5):
            case 0:
                header[
                    name.replace(
                        r.choice(("lora_A", "unet", "weight", ".")), r.choice(("lora_B", "x", "dora_scale", "", "alpha"))
                    )
                ] = entry
            case 1:
                header[name] = entry | {"dtype": r.choice(("I8", "F16", "BF16", "F64", "BOOL", "F8_E4M3", "C64", "I64", "U8"))}
            case 2:
                header[name] = entry | {"shape": [r.choice((0, 1, 2, 8, 2**40)) for _ in range(r.randrange(4))]}
            case 3:
                header[name] = r.choice((None, [], "x", 1, {**entry, "data_offsets": [r.randrange(9), r.randrange(2**50)]}))
            case _:
                header["__metadata__"] = {
                    "lora_adapter_metadata": r.choice(("{", "[]", '{"unet.r": "x"}', '{"unet.lora_alpha": 0}'))
                }
                header[name] = entry
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]
    except (ValueError, struct.error, AttributeError, TypeError, MemoryError):
        return _bits(r, data)


def _chunks(r: random.Random, data: bytes) -> bytes:
    """Change a chunk of a PNG file; its checksum fits again."""
    if not data.startswith(b"\x89PNG") or len(data) < 40:
        return _bits(r, data)
    parts, at = [], 8
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        parts.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    turn = r.randrange(len(parts))
    name, content = parts[turn]
    parts[turn] = (name, _numbers(r, content))
    body = b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts)
    return data[:8] + body


BINARY: tuple[Mutation, ...] = (_bits, _numbers, _pieces, _words)
TEXT: tuple[Mutation, ...] = (_bits, _pieces, _words, _words, _lines)
BY_SUFFIX: Mapping[str, tuple[Mutation, ...]] = {
    ".npz": (*BINARY, *map(_zipped, (_bits, _numbers, _numbers, _pieces))),
    ".safetensors": (*BINARY, _header, _header, _header),
    ".png": (*BINARY, _chunks, _chunks),
    ".toml": TEXT, ".json": TEXT, ".jsonl": TEXT, ".txt": TEXT, ".csv": TEXT,
}  # fmt: skip


def attack(target: Target, folder: Path, numbers: range, seed: int) -> dict[str, int]:
    """Read so many changed folders; return how many were read and how many refused.

    Raises:
        BrokenError: A reader raised another error, wrote several lines, or took too long or too much memory. The changed
            file is kept in `folder`.
    """
    sound = folder / "sound"
    sound.mkdir(parents=True)
    target.write(sound)
    target.read(sound)
    files = [path for path in sorted(sound.rglob("*")) if path.is_file() and re.fullmatch(target.only or ".*", path.name)]
    counts = {"read": 0, "refused": 0}
    for number in numbers:
        r = random.Random(f"{seed}/{number}")
        place = folder / "changed"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(sound, place)
        chosen = place / r.choice(files).relative_to(sound)
        changes = BY_SUFFIX.get(chosen.suffix, TEXT if target.text else BINARY)
        content = chosen.read_bytes()
        for _ in range(r.choice((1, 1, 1, 2))):
            content = r.choice(changes)(r, content)
        chosen.write_bytes(content)
        counts["refused" if _judged(target, place, f"{chosen.relative_to(place)}, input {number}") else "read"] += 1
    shutil.rmtree(folder)
    return counts


def _judged(target: Target, place: Path, where: str) -> str:
    """Return the error's line, or "" if the files were read."""
    began, held, told = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(place)
    except InputError as error:
        told = str(error) or "an empty line"
    except BaseException as error:
        raise BrokenError(f"{where} in {place}: {type(error).__name__}: {error}") from error
    spent = time.process_time() - began
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1024
    if spent > SECONDS or more > MEGABYTES:
        raise BrokenError(f"{where} in {place}: {spent:.1f} s, {more:.0f} MB")
    return told


def quiet() -> None:
    """One thread, no network, and no output of libraries."""
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
