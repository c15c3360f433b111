"""The image cache: arrays are made once, atomically, memory-mapped, and sent to other processes by name."""

import errno
import os
import pickle
import threading
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import pets

from warmfed.algorithms.fedavg import FedAvg
from warmfed.core.tensors import join
from warmfed.core.training import Training
from warmfed.data import Federation, folder
from warmfed.data import build as assembly
from warmfed.data.image_cache import Cache, Mapped, usual
from warmfed.runs.backend import simulate
from warmfed.tasks import Classify
from warmfed.utils.errors import InputError


def one_to_six(into: np.ndarray) -> None:
    into[:] = np.arange(1, 7).reshape(2, 3)


def test_an_array_is_made_once_and_writing_to_it_stays_here(tmp_path: Path) -> None:
    cache, calls = Cache(tmp_path / "new"), []

    def make(into: np.ndarray) -> None:
        calls.append(1)
        one_to_six(into)

    first = cache.array("x", (2, 3), make)
    first[0, 0] = 99
    again = cache.array("x", (2, 3), make)
    assert again.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert calls == [1]
    assert cache.size() == 6
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.u8"]


def test_a_maker_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def make(into: np.ndarray) -> None:
        into[:] = 1
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        Cache(tmp_path).array("x", (2, 3), make)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_length_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "x.u8").write_bytes(b"12345")
    assert Cache(tmp_path).array("x", (2, 3), one_to_six).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_two_makers_at_once_both_get_it(tmp_path: Path) -> None:
    both, found = threading.Barrier(2, timeout=20), []

    def make(into: np.ndarray) -> None:
        both.wait()  # both have found none and are making it
        one_to_six(into)

    def work() -> None:
        found.append(Cache(tmp_path).array("x", (2, 3), make).tolist())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[[1, 2, 3], [4, 5, 6]]] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["x.u8"]


def test_what_a_killed_process_left_goes_after_a_day(tmp_path: Path) -> None:
    for name, age in ((".old.partial", 90_000), (".young.partial", 60)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    Cache(tmp_path).array("x", (2, 3), one_to_six)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".young.partial", "x.u8"]


def test_a_full_disk_is_told_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"cannot keep 0 MB .* No space left .*data\.cache or WARMFED_CACHE"):
        Cache(tmp_path).array("x", (2, 3), one_to_six)
    assert list(tmp_path.iterdir()) == []


def test_the_place_is_named_or_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARMFED_CACHE", "/some/where")
    assert usual() == Path("/some/where")
    monkeypatch.delenv("WARMFED_CACHE")
    assert usual().name == "warmfed"


def kept(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}


def test_pictures_are_decoded_once_by_their_content(tmp_path: Path) -> None:
    root, cache = pets(tmp_path / "pets"), tmp_path / "cache"
    first = folder(root, image_size=8, cache=str(cache))
    before = kept(cache)
    assert len(before) == 2  # the images, and their digests and sizes
    root.rename(tmp_path / "moved")
    assert folder(tmp_path / "moved", image_size=8, seed=5, cache=str(cache)).classes == first.classes
    assert kept(cache) == before
    again = folder(tmp_path / "moved", image_size=8, cache=str(cache))
    assert (again.fingerprint, again.sides) == (first.fingerprint, ((8, 8), (8, 8)))
    os.replace(tmp_path / "moved" / "home" / "cat" / "00.png", tmp_path / "moved" / "home" / "dog" / "00.png")
    assert folder(tmp_path / "moved", image_size=8, cache=str(cache)).fingerprint != first.fingerprint
    assert len(kept(cache)) == 4
    next(cache.glob("*-facts.u8")).unlink()
    folder(tmp_path / "moved", image_size=8, cache=str(cache))


@pytest.fixture
def mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    """Return the pets, memory-mapped as a larger set would be."""
    monkeypatch.setattr(assembly, "HELD", 0)
    return folder(pets(tmp_path / "pets"), image_size=8, cache=str(tmp_path / "cache"))


def test_many_images_stay_in_a_file(mapped: Federation, tmp_path: Path) -> None:
    assert all(isinstance(table, Mapped) for site in mapped.sites.values() for table in site.splits.values())
    with pytest.MonkeyPatch.context() as usual_bound:
        usual_bound.setattr(assembly, "HELD", 2**20)
        held = folder(tmp_path / "pets", image_size=8, cache=str(tmp_path / "other"))
    assert mapped.fingerprint == held.fingerprint
    table = mapped.sites["home"].train
    table["image"][0] = 0  # this process's own
    assert folder(tmp_path / "pets", image_size=8, cache=str(tmp_path / "cache")).sites.keys() == mapped.sites.keys()
    file = next(path for path in (tmp_path / "cache").iterdir() if path.stat().st_size == 40 * 192)
    assert (np.memmap(file, np.uint8, "r").reshape(40, -1).max(axis=1) > 0).all()


def test_a_mapped_table_goes_to_other_processes_by_name(mapped: Federation, tmp_path: Path) -> None:
    table = mapped.sites["shelter"].test
    sent = bytes(ForkingPickler.dumps(table))
    assert len(sent) < 2000
    assert table["image"].nbytes == 768
    back = pickle.loads(sent)
    assert torch.equal(back["image"], table["image"])
    assert torch.equal(back["label"], table["label"])
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    from warmfed.data import image_cache as cache

    cache._mapped.cache_clear()
    with pytest.raises(InputError, match="gone or damaged"):
        pickle.loads(bytes(ForkingPickler.dumps(table)))


def test_all_tables_of_a_split_join_without_a_copy(mapped: Federation) -> None:
    tables = [site.train for site in mapped.sites.values()]
    whole = join(tables)
    assert whole["image"].data_ptr() == tables[0]["image"].data_ptr()
    assert torch.equal(whole["image"], torch.cat([table["image"] for table in tables]))
    assert torch.equal(whole["label"], torch.cat([table["label"] for table in tables]))
    turned = join(tables[::-1])
    assert torch.equal(turned["image"], torch.cat([table["image"] for table in tables[::-1]]))


def test_a_run_on_mapped_tables_is_the_run_on_held_ones(mapped: Federation, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as usual_bound:
        usual_bound.setattr(assembly, "HELD", 2**20)
        held = folder(tmp_path / "pets", image_size=8, cache=str(tmp_path / "cache"))
    algorithm = FedAvg(rounds=1, local=Training(lr=0.02, steps=2, batch_size=4))
    results = []
    for federation, workers in ((mapped, 2), (mapped, 1), (held, 1)):
        task = Classify(federation.shape, 2, "linear")
        results.append([done.results() for done in simulate(algorithm, federation, task, workers=workers)])
    assert results[0] == results[1] == results[2]
