"""Hostile input: pipes, devices, bombs, nesting, huge labels, code in a base, markup in names, file modes."""

import gzip
import io
import json
import os
import re
import resource
import socket
import stat
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pipelines
import pytest
from PIL import Image
from rich.table import Table

from warmfed import report
from warmfed.cli.parser import main
from warmfed.config import read_toml
from warmfed.data import arrays, load
from warmfed.data.readers.archives import Archive
from warmfed.diffusion import pipeline
from warmfed.diffusion.lora import opened
from warmfed.evaluation.features import extractor
from warmfed.experiments.compare import plan
from warmfed.pretraining.pretrain import kept
from warmfed.runs.console import LineReporter, console
from warmfed.utils.errors import InputError
from warmfed.utils.files import atomic_write, loads_json, read_bytes, read_json, read_lines

BOUND = 60
"""Seconds that a reader may take with everything that it imports."""
LOADED = 3 * 2**30
"""Bytes of addresses that a reader may take beside what it has imported."""

READERS = {
    "toml": "from warmfed.config import read_toml; read_toml(path)",
    "json": "from warmfed.utils.files import read_json; read_json(path, 'it')",
    "adapter": "from warmfed.diffusion.lora import opened; opened(path, 'it')",
    "npz": "from warmfed.data import load; load('npz', str(path))",
    "csv": "from warmfed.data import load; load('csv', str(path))",
    "phase": "from warmfed.pretraining.pretrain import kept; kept(path.parent, path.stem, dict)",
    "features": "from warmfed.evaluation.features import extractor; extractor(str(path), 'digits', (3, 32, 32))",
    "run": "from warmfed.runs.folder import read_config; read_config(path)",
}


def refused_alone(code: str) -> str:
    """Return the error line of a reader in a separate process with limits of time and memory."""
    script = (
        "import sys, resource; from pathlib import Path; from warmfed.utils.errors import InputError\n"
        "import torch, numpy, warmfed.data, warmfed.config\n"
        f"size = int(open('/proc/self/statm').read().split()[0]) * {resource.getpagesize()} + {LOADED}\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        f"try:\n    {code}\nexcept InputError as error:\n    print(error); sys.exit(2)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=BOUND, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stdout.count("\n") == 1
    return done.stdout


def special(kind: str, path: Path) -> None:
    """A named pipe, a link to a device, or a socket."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        here = os.open(path.parent, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{here}/{path.name}")  # a path may be too long for a socket
        os.close(here)


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_is_refused_by_every_reader(reader: str, tmp_path: Path) -> None:
    suffix = {"npz": ".npz", "csv": ".csv", "phase": ".safetensors", "features": ".npz"}.get(reader, "")
    path = tmp_path / f"bait{suffix}"
    inner = path / "config.toml" if reader == "run" else path
    inner.parent.mkdir(exist_ok=True)
    special("pipe", inner)
    assert "not a regular file" in refused_alone(f"path = Path({str(path)!r}); {READERS[reader]}")


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_pictures_lists_and_idx_files_that_are_none(kind: str, tmp_path: Path) -> None:
    for site in ("one", "two"):
        for name in ("cat", "dog"):
            (tmp_path / "folder" / site / name).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (4, 4), (i * 40, len(site + name) * 30, 0)).save(
                    tmp_path / "folder" / site / name / f"{site}{name}{i}.png"
                )
    special(kind, tmp_path / "folder" / "one" / "cat" / "bait.png")
    told = refused_alone(f"warmfed.data.load('folder', {str(tmp_path / 'folder')!r}, cache={str(tmp_path / 'cache')!r})")
    assert "bait.png cannot be read" in told
    assert "not a regular file" in told
    (tmp_path / "folder" / "one" / "cat" / "bait.png").unlink()
    special(kind, tmp_path / "folder" / "one_train.txt")
    told = refused_alone(f"warmfed.data.load('folder', {str(tmp_path / 'folder')!r}, cache={str(tmp_path / 'cache')!r})")
    assert "not a regular file" in told or "lists" in told


def bomb(path: Path, gigabytes: float = 3) -> None:
    """An .npz of a few MB that holds gigabytes of black images."""
    rows = int(gigabytes * 2**30 / 28**2)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("train_images.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(
            file,
            {"descr": "|u1", "fortran_order": False, "shape": (rows, 28, 28)},  # type: ignore[arg-type]
        )
        block = bytes(2**24)
        for start in range(0, rows * 784, 2**24):
            file.write(block[: min(2**24, rows * 784 - start)])
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("train_labels.npy", "w") as file:
        np.lib.format.write_array(file, np.zeros(rows, np.uint8))


def test_a_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    bomb(tmp_path / "bomb.npz")
    assert (tmp_path / "bomb.npz").stat().st_size < 2**23
    with pytest.raises(InputError, match=r"bomb\.npz is damaged .*it unpacks from 3\.\d to 3,2\d\d MB.*without compression"):
        load("npz", str(tmp_path / "bomb.npz"), cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
    with pytest.raises(InputError, match="it unpacks from"):
        extractor(str(tmp_path / "bomb.npz"), "digits", (3, 32, 32))
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">IIII", 0x803, 2**20, 64, 64) + bytes(2**22))
    with gzip.open(tmp_path / "train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">II", 0x801, 2**20) + bytes(2**20))
    with pytest.raises(InputError, match=r"damaged \(it unpacks from .* to 4,295 MB"):
        load("idx", str(tmp_path), cache=str(tmp_path / "cache"))


@pytest.mark.parametrize("shape", [(10**12, 28, 28), (2**62, 2**62, 4), (10**12,), (-1, 28, 28)])
def test_a_header_that_promises_more_than_the_file_holds(shape: tuple[int, ...], tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})  # type: ignore[arg-type]
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("train_images.npy", header.getvalue() + bytes(64))
        archive.writestr("train_labels.npy", header.getvalue() + bytes(64))
    with pytest.raises(InputError, match=r"declares shape .* but has 64 bytes"):
        load("npz", str(tmp_path / "x.npz"), cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"declares shape .* but has 64 bytes"):
        Archive(tmp_path / "x.npz")["train_images"]


def test_objects_in_an_archive_are_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", train_images=np.array([print, 1], dtype=object), train_labels=np.zeros(2, np.int64))
    with pytest.raises(InputError, match="holds objects"):
        load("npz", str(tmp_path / "x.npz"))


def test_a_label_beyond_the_images_is_refused() -> None:
    code = "import numpy as np; warmfed.data.arrays({'a': (np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 2**40]))})"
    assert "expected labels from 0 to 2147483647, got 0 to 1099511627776" in refused_alone(code)
    assert (
        len(arrays({"a": (np.random.default_rng(0).integers(0, 255, (40, 8, 8), np.uint8), np.arange(40) % 2 * 7)}).classes)
        == 8
    )


def test_a_long_name_does_not_cost_its_length_in_every_row(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = "".join(f"a.png,{i % 2},{i if i else 'x' * 100_000}\n" for i in range(40_000))
    (tmp_path / "t.csv").write_text(f"image,label,group\n{rows}")
    code = f"warmfed.data.load('csv', {str(tmp_path / 't.csv')!r}, group='group', image_size=1, cache={str(tmp_path / 'c')!r})"
    assert "expected names of at most 1024 characters, got 100000" in refused_alone(code)


def png(path: Path, width: int, height: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    )


def test_pictures_that_unpack_to_too_much_or_run_a_program(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "site" / name).mkdir(parents=True)
    png(tmp_path / "site" / "cat" / "wall.png", 12_000, 10_000)
    (tmp_path / "site" / "dog" / "run.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(InputError) as caught:
        load("folder", str(tmp_path), cache=str(tmp_path / "cache"))
    assert "wall.png has more than 89,478,485 pixels" in str(caught.value)
    assert "run.png does not decode" in str(caught.value)


DEEP = 100_000


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("x = " + "[" * DEEP, read_toml),
        (".".join(["a"] * 2000) + " = 1", read_toml),
        ("[" * DEEP, lambda path: read_json(path, "it")),
        ('{"a":' * DEEP, lambda path: read_lines(path, "it")),
        ("[" * DEEP, pipeline.json_of),
    ],
)
def test_deep_nesting_is_one_line(text: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "deep").write_text(text)
    with pytest.raises(InputError, match="nested"):
        read(tmp_path / "deep")


def test_deep_nesting_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--dry-run", "--set", f"algorithm.rounds={'[' * DEEP}"]) == 2
    assert main(["run", "--dry-run", "--set", f"{'a.' * 3000}b=1"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_a_deep_header_of_safetensors_is_one_line(tmp_path: Path) -> None:
    header = b'{"__metadata__":' + b"[" * DEEP
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InputError, match="damaged"):
        opened(tmp_path / "x.safetensors", "it")
    with pytest.raises(InputError, match="damaged"):
        kept(tmp_path, "x", lambda: ({}, {}))


def test_a_large_file_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**42)
    with pytest.raises(InputError, match=r"cannot read it .*: it holds 4,398,047 MB, [\d,]+ MB of memory are free"):
        read_bytes(tmp_path / "large", "it")
    with pytest.raises(InputError, match="MB are allowed"):
        read_toml(tmp_path / "large")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "sd15"
    pipelines.write("sd15", folder)
    return folder


def edited(base: Path, name: str, edit: Callable[[dict], object], to: Path) -> Path:  # type: ignore[type-arg]
    subprocess.run(["cp", "-r", str(base), str(to)], check=True)
    told = json.loads((to / name).read_text())
    edit(told)
    (to / name).write_text(json.dumps(told))
    return to


def test_a_base_never_runs_its_own_code(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    ran = tmp_path / "ran"
    made = edited(
        base, "model_index.json", lambda told: told.update(text_encoder=["transformers", "AutoModel"]), tmp_path / "b"
    )
    code = f"import pathlib; pathlib.Path({str(ran)!r}).touch()\n"
    code += "from transformers import CLIPTextModel as Own, CLIPTextConfig as Told\n"
    (made / "text_encoder" / "own.py").write_text(code)
    config = json.loads((made / "text_encoder" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoModel": "own.Own", "AutoConfig": "own.Told"}}
    (made / "text_encoder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"expected transformers\.CLIPTextModel .*AutoModel"):
        pipeline.load(made)
    with pytest.raises(InputError, match="cannot load a vision model"):
        extractor(str(made / "text_encoder"), "digits", (3, 32, 32))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        (
            "model_index.json",
            lambda t: t.update(unet=["diffusers", "StableDiffusionPipeline"]),
            "expected diffusers.UNet2DConditionModel",
        ),
        ("model_index.json", lambda t: t.update(vae=["own_module", "AutoencoderKL"]), "diffusers.AutoencoderKL"),
        ("model_index.json", lambda t: t.update(unet=5), "expected"),
        ("model_index.json", lambda t: t.update(vae=[]), "expected"),
        ("model_index.json", lambda t: t.update(_class_name=["own", "Pipe"]), "a pipeline of kind"),
        ("unet/config.json", lambda t: t.update(auto_map={}), "its own code (auto_map)"),
        ("tokenizer/tokenizer_config.json", lambda t: t.update(auto_map={}), "its own code (auto_map)"),
        ("text_encoder/config.json", lambda t: t.update(hidden_size="many"), "cannot load text_encoder"),
        ("text_encoder/config.json", lambda t: t.update(quantization_config={}), "quantization_config"),
    ],
)
def test_a_base_of_wrong_types(base: Path, name: str, edit: Callable[[dict], object], words: str, tmp_path: Path) -> None:  # type: ignore[type-arg]
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        pipeline.load(edited(base, name, edit, tmp_path / "b"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize("text", ["no JSON", "[1, 2]", "5", "[" * DEEP, ""])
def test_a_base_of_damaged_files(base: Path, name: str, text: str, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", str(base), str(tmp_path / "b")], check=True)
    (tmp_path / "b" / name).write_text(text)
    with pytest.raises(InputError) as caught:
        pipeline.load(tmp_path / "b")
    assert "\n" not in str(caught.value)


def test_links_of_a_base_stay_in_it(base: Path, tmp_path: Path) -> None:
    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    subprocess.run(["cp", "-r", str(base), str(tmp_path / "b")], check=True)
    (tmp_path / "b" / weights).rename(tmp_path / "elsewhere.safetensors")
    (tmp_path / "b" / weights).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(InputError, match="leads out of"):
        pipeline.find(tmp_path / "b")
    hub = tmp_path / "models--a--b"  # as the hub's cache lays it out
    (hub / "snapshots").mkdir(parents=True)
    (hub / "blobs").mkdir()
    (tmp_path / "b").rename(hub / "snapshots" / "1")
    (tmp_path / "elsewhere.safetensors").rename(hub / "blobs" / "2")
    (hub / "snapshots" / "1" / weights).unlink()
    (hub / "snapshots" / "1" / weights).symlink_to(Path("..") / ".." / ".." / "blobs" / "2")
    assert pipeline.find(hub / "snapshots" / "1") == hub / "snapshots" / "1"
    os.mkfifo(hub / "snapshots" / "1" / "unet" / "generation_config.json")
    with pytest.raises(InputError, match="not a regular file"):
        pipeline.find(hub / "snapshots" / "1")


def test_shards_are_safetensors_beside_their_index(base: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", str(base), str(tmp_path / "b")], check=True)
    index = tmp_path / "b" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    for held in ({"a": "evil.bin"}, {"a": "../../x.safetensors"}, {"a": 5}, ["x"]):
        index.write_text(json.dumps({"weight_map": held}))
        with pytest.raises(InputError, match="not safetensors beside it"):
            pipeline.find(tmp_path / "b")


EVIL = "a|b`c`<script>alert(1)</script>[x](javascript:alert(2))\n# d\x1b[31m"


def test_names_in_markdown_render_as_themselves() -> None:
    row = {"algorithm": EVIL, "rounds": 1, "settings": {}, "cells": [], "bytes_up": 1.0, "seconds": 1.0, "global_mean": 50.0}
    text = report.markdown({"rows": [row], "tests": [], "measure": "accuracy", "federation": "f", "seeds": [0], "rounds": 1})
    line = next(line for line in text.splitlines() if "script" in line)
    assert r"a\|b\`c\`\<script>alert(1)\</script>\[x\](javascript:alert(2)) # d\[31m" in line
    assert "\x1b" not in text
    assert "\x1b" not in report.latex({"rows": [row], "tests": [], "federation": "f", "seeds": [0], "rounds": 1})


def test_names_of_arms_are_plain() -> None:
    assert plan(settings={"arms": {"long (μ=0.1), 2": {"algorithm": {"name": "fedavg"}}}})
    with pytest.raises(InputError, match=r"expected an arm's name .*, got '<script>'"):
        plan(settings={"arms": {"<script>": {"algorithm": {"name": "fedavg"}}}})


def test_names_on_the_terminal_are_neither_codes_nor_markup(capsys: pytest.CaptureFixture[str]) -> None:
    name = "[red]\x1b]0;own\x07\x1b[2Jcat[/] :smile: \x9b31m"
    table = Table("class")
    table.add_row(name)
    out = console()
    out.print(table)
    out.print(name, highlight=False)
    LineReporter().say(name)
    assert main(["run", "--algorithm", f"{name}\nx"]) == 2
    told = capsys.readouterr()
    assert told.out.count("[red]]0;own[2Jcat[/] :smile: 31m") == 3
    assert "[red]" in told.err
    assert not {"\x1b", "\x07", "\x9b"} & set(told.out + told.err)


OPEN = stat.S_IRWXG | stat.S_IRWXO


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_what_is_written_is_private_and_respects_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        atomic_write(tmp_path / "a" / "b" / "state", b"x")
        atomic_write(tmp_path / "p" / "report.html", "x", 0o644)
        images = np.random.default_rng(0).integers(0, 255, (60, 8, 8), np.uint8)
        np.savez(tmp_path / "x.npz", train_images=images, train_labels=np.arange(60) % 2)
        load("npz", str(tmp_path / "x.npz"), cache=str(tmp_path / "deep" / "cache"))
    finally:
        os.umask(before)
    for path in [tmp_path / "a", *(tmp_path / "a").rglob("*"), tmp_path / "deep", *(tmp_path / "deep").rglob("*")]:
        assert not path.stat().st_mode & OPEN, path
    assert stat.S_IMODE((tmp_path / "p" / "report.html").stat().st_mode) == 0o644 & ~mask
    assert stat.S_IMODE((tmp_path / "p").stat().st_mode) == 0o755 & ~mask


def test_a_run_leaves_nothing_to_other_users(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (60, 32, 32), np.uint8)
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=np.arange(60) % 2)
    data = ["data.source=npz", f"data.path={tmp_path / 'x.npz'}", f"data.cache={tmp_path / 'x' / 'cache'}"]
    before = os.umask(0o022)
    try:
        asked = ["run", "--quiet", "--algorithm", "centralized", "--out", str(tmp_path / "x" / "run"), "--rounds", "1"]
        assert main([*asked, "--set", *data]) == 0
    finally:
        os.umask(before)
    found = [tmp_path / "x", *(tmp_path / "x").rglob("*")]
    assert len(found) > 10
    assert not [path for path in found if path.stat().st_mode & OPEN]


def test_no_file_is_unpickled_and_no_foreign_code_is_trusted() -> None:
    """Worker processes of one run pickle for each other; `convert` reads tensors and their containers alone."""
    source = Path(__file__).parents[2] / "src" / "warmfed"
    allowed = {"process_pool.py": ["import pickle"], "convert.py": ["torch.load("]}
    for path in source.rglob("*.py"):
        found = re.findall(r"import pickle|allow_pickle=True|trust_remote_code=True|np\.load\(|torch\.load\(", path.read_text())
        assert found == allowed.get(path.name, []), path
    assert "weights_only=True" in (source / "models" / "convert.py").read_text()


def test_json_that_is_deep_raises_as_other_damage_does() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        loads_json("[" * DEEP)
