"""The packages of the extra "data", imported when they are needed: Hugging Face `datasets`, flwr-datasets' partitioners."""

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
        raise InputError(f"Parquet files and hub data are read by the package datasets; {_EXTRA}") from error
    datasets.disable_progress_bars()
    return datasets


def partitioned(name: str, options: Mapping[str, Any], columns: Mapping[str, NDArray[Any]]) -> list[Ints]:
    """Row numbers of each site, dealt by a partitioner of flwr-datasets, such as "PathologicalPartitioner".

    Args:
        options: its arguments; `partition_by` is "label" where it takes one and none is given.
        columns: what it may go by.
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
        dealer = cls(**options)
        dealer.dataset = table
        parts = [np.array(dealer.load_partition(i)["row"], np.int64) for i in range(dealer.num_partitions)]
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} does not take {dict(options)} here: {' '.join(str(error).split())}") from error
    return parts
