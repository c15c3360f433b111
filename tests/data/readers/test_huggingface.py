"""Parquet files, saved data sets and flwr-datasets' partitioners, without a network; needs the extra "data"."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import picture, refused, sizes

from warmfed.data import hub, load, parquet
from warmfed.data.partition import dirichlet, iid, shards

datasets: Any = pytest.importorskip("datasets", reason="needs the extra: pip install 'warmfed[data]'")
datasets.disable_progress_bars()


def encoded(seed: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def digits(count: int = 60) -> Any:
    features = datasets.Features({
        "img": datasets.Image(), "fine": datasets.ClassLabel(names=["dog", "cat"]),
        "writer": datasets.Value("string"), "page": datasets.Value("int64"),
    })  # fmt: skip
    rows = range(count)
    columns = {"img": [encoded(i) for i in rows], "fine": [i % 2 for i in rows], "writer": [f"w{2 * i // count}" for i in rows]}
    return datasets.Dataset.from_dict({**columns, "page": [i // 5 for i in rows]}, features=features)


def test_parquet_files_and_saved_tables_are_the_same_data(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    digits().to_parquet(str(tmp_path / "files" / "0.parquet"))
    digits().save_to_disk(str(tmp_path / "saved"))
    options = {"site": "writer", "group": "page", "image_size": 8}
    first = load("parquet", str(tmp_path / "files"), **options)
    assert first.classes == ("dog", "cat")
    assert list(first.sites) == ["w0", "w1"]
    pages = [{int(name.split("/")[1]) // 5 for name in first.origin["w0"][part]} for part in ("train", "validation", "test")]
    assert sum(map(len, pages)) == len(set().union(*pages)) == 6
    assert load(str(tmp_path / "saved"), **options).fingerprint == first.fingerprint


def test_files_by_split_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    for part, count in (("train", 40), ("test", 20)):
        digits(count).select(range(count)).to_parquet(str(tmp_path / f"{part}-00000-of-00001.parquet"))
    federation = parquet(tmp_path, image_size=8)
    assert sum(sizes(federation)[tmp_path.name]) == 40  # the 20 test images are train images, too, and stay in test
    assert sizes(federation)[tmp_path.name][2] == 20
    refused(lambda: parquet(tmp_path, label="fein"), "no column 'fein' for label; did you mean 'fine'?")
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"no table")
    refused(lambda: parquet(tmp_path), "do not read as one table")
    refused(lambda: parquet(tmp_path / "none"), "there are no Parquet files")


def test_rows_without_a_label_or_a_picture_are_named(tmp_path: Path) -> None:
    table = digits(10).to_dict()
    table["fine"][3], table["img"][4], table["img"][5] = None, None, {"bytes": b"no picture", "path": None}
    datasets.Dataset.from_dict(table, features=digits(1).features).to_parquet(str(tmp_path / "x.parquet"))
    refused(
        lambda: parquet(tmp_path / "x.parquet", image_size=8),
        "all/3: expected a label and a site", "all/4 cannot be read: the row has no picture", "all/5 does not decode",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("column", "cells", "told"),
    [
        ("writer", [None, "a"], "all/0: expected a label and a site"),
        ("writer", [float("nan"), 1.0], "all/0: expected a label and a site"),
        ("fine", [0.0, float("nan")], "all/1: expected a label and a site"),
        ("fine", [0.0, 1.5], "all/1: expected a label and a site"),
        ("fine", [[1], [2]], "all/0: expected a label and a site"),
        ("img", [{"bytes": None, "path": None}] * 2, "all/0 cannot be read: the row has no picture"),
        ("img", [1.5, 2.5], "column 'img' has no pictures (float64)"),
    ],
)
def test_cells_that_are_no_name_and_no_picture(column: str, cells: list[Any], told: str, tmp_path: Path) -> None:
    columns = {"img": [encoded(i) for i in range(20)], "fine": ["cat", "dog"] * 10, "writer": ["a", "b"] * 10}
    table = datasets.Dataset.from_dict(columns | {column: cells * 10})
    table.to_parquet(str(tmp_path / "x.parquet"))
    refused(lambda: parquet(tmp_path / "x.parquet", image="img", label="fine", site="writer", image_size=8), told)


def test_whole_floats_and_chosen_sites(tmp_path: Path) -> None:
    columns = {
        "img": [encoded(i) for i in range(40)],
        "fine": [1.0, 2.0] * 20,
        "writer": [" a"] * 20 + [None] * 10 + ["b"] * 10,
    }
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "x.parquet"))
    options = {"image": "img", "label": "fine", "site": "writer", "image_size": 8}
    federation = parquet(tmp_path / "x.parquet", sites=["a"], **options)
    assert (federation.classes, list(federation.sites)) == (("1", "2"), ["a"])
    refused(lambda: parquet(tmp_path / "x.parquet", sites=["c"], **options), "there is no site 'c'; known: a, b")


def test_the_hub_is_not_asked_offline() -> None:
    refused(lambda: hub("no/such-set"), "cannot load the data set 'no/such-set' of the hub")


LABELS = np.repeat(np.arange(10), 60)


def theirs(name: str, **options: object) -> list[np.ndarray]:
    pytest.importorskip("flwr_datasets", reason="needs the extra: pip install 'warmfed[data]'")
    from warmfed.data.extras import partitioned

    return partitioned(name, options, {"label": LABELS})


def table(parts: list[np.ndarray]) -> np.ndarray:
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(600))
    return np.stack([np.bincount(LABELS[part], minlength=10) for part in parts])


def test_our_rules_skew_as_theirs_do() -> None:
    ours, others = iid(LABELS, 7, key=(0,)), theirs("IidPartitioner", num_partitions=7)
    assert sorted(table(ours).sum(axis=1)) == sorted(table(others).sum(axis=1))
    shape = {"num_partitions": 10, "num_classes_per_partition": 2, "class_assignment_mode": "deterministic"}
    ours, others = shards(LABELS, 10, 2, key=(0,)), theirs("PathologicalPartitioner", **shape)
    assert sorted(map(sorted, table(ours).tolist())) == sorted(map(sorted, table(others).tolist()))


@pytest.mark.parametrize("alpha", [0.5, 5.0])
def test_our_label_skew_is_as_strong_as_theirs(alpha: float) -> None:
    free = {"num_partitions": 5, "alpha": alpha, "min_partition_size": 1, "self_balancing": False}
    ours = [table(dirichlet(LABELS, 5, alpha, key=(seed,), min_partition_size=1)) for seed in range(20)]
    others = [table(theirs("DirichletPartitioner", **free, seed=seed)) for seed in range(20)]
    spread = np.array([[counts.std(axis=0).mean() for counts in deals] for deals in (ours, others)])
    error = np.sqrt((spread.var(axis=1, ddof=1) / 20).sum())
    assert abs(spread[0].mean() - spread[1].mean()) < 3 * error


def test_a_partitioner_of_theirs_deals_our_data(tmp_path: Path) -> None:
    pytest.importorskip("flwr_datasets", reason="needs the extra: pip install 'warmfed[data]'")
    digits().to_parquet(str(tmp_path / "x.parquet"))

    def partitioned(partitioner: str, **options: object) -> dict[str, tuple[int, ...]]:
        deal = {"rule": "flwr", "partitioner": partitioner, "options": options}
        return sizes(parquet(tmp_path / "x.parquet", site="writer", image_size=8, partition=deal))

    assert partitioned("IidPartitioner", num_partitions=2) == {"site-0": (18, 6, 6), "site-1": (18, 6, 6)}
    assert partitioned("NaturalIdPartitioner", partition_by="site") == {"site-0": (18, 6, 6), "site-1": (18, 6, 6)}
    refused(lambda: partitioned("IidPartitoner"), "did you mean 'IidPartitioner'?")
    refused(lambda: partitioned("IidPartitioner", number=2), "IidPartitioner does not accept {'number': 2}")
