"""Packages of the extra "data", imported on first use: Hugging Face `datasets` and flwr-datasets' partitioners."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..utils.errors import InputError, suggest

Ints = NDArray[np.int64]
_EXTRA = "install it by pip install 'warmfed[data]'"


def hf_datasets() -> Any:
    """Return the module `datasets`; raise `InputError` if it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"Parquet files and hub data need the package datasets; {_EXTRA}") from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the reader raises what it would log
    return datasets


def partitioned(name: str, options: Mapping[str, Any], columns: Mapping[str, NDArray[Any]]) -> list[Ints]:
    """Return the row numbers of each site, from a partitioner of flwr-datasets.

    Args:
        name: class of the partitioner, such as "PathologicalPartitioner".
        options: its arguments; `partition_by` is "label" by default.
        columns: columns that the partitioner may use.

    Raises:
        InputError: if the package or the partitioner is missing, or the partitioner refuses the arguments.
    """
    try:
        from flwr_datasets import partitioner as partitioners
    except ImportError as error:
        raise InputError(f"the partitioner {name!r} is in the package flwr-datasets; {_EXTRA}") from error
    known = [each for each in partitioners.__all__ if each.endswith("Partitioner") and each != "Partitioner"]
    if name not in known:
        raise InputError(f"flwr-datasets has no {name!r}{suggest(name, known)}")
    cls: Any = getattr(partitioners, name)
    if "partition_by" in inspect.signature(cls).parameters:
        options = {"partition_by": "label", **options}
    count = len(columns["label"])
    table = hf_datasets().Dataset.from_dict(
        {**{key: value.tolist() for key, value in columns.items()}, "row": list(range(count))}
    )
    try:
        made = cls(**options)
        made.dataset = table
        parts = [np.array(made.load_partition(i)["row"], np.int64) for i in range(made.num_partitions)]
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} does not accept {dict(options)}: {' '.join(str(error).split())}") from error
    return parts
