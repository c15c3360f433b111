"""Damaged and odd files of every kind are read or refused in one line; `benchmarks/fuzz_files.py` tries many more."""

from pathlib import Path

import fuzz_files
import pytest

READERS = ("pictures", "csv", "npz", "idx", "split lists", "toml", "adapters", "run folders", "parquet")
NUMBER = 200


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz_files.Target]:
    return fuzz_files.targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("reader", READERS)
def test_files_are_read_or_refused_in_one_line(reader: str, targets: dict[str, fuzz_files.Target], tmp_path: Path) -> None:
    if reader not in targets:
        pytest.skip("needs the extra: pip install 'warmfed[data]'")
    counts = fuzz_files.attack(targets[reader], tmp_path / "attack", range(NUMBER), seed=0)
    assert sum(counts.values()) == NUMBER
    assert min(counts.values()) > 0
