"""Arithmetic on named tensors. The names of both operands must be equal.

`mean` and `mix` return the first operand's integer tensors (counters) unchanged. All other functions follow torch.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
"""Named and detached tensors: weights, gradients, columns of data."""

Table = Mapping[str, Tensor]
"""Tensors that share their first dimension: {"image": uint8 [n, 3, h, w], "label": int64 [n]}."""


def _pair(op: Callable[[Tensor, Tensor], Tensor], a: Tensors, b: Tensors) -> dict[str, Tensor]:
    if a.keys() != b.keys():
        raise KeyError(f"tensor names differ: {sorted(a.keys() ^ b.keys())}")
    return {name: op(a[name], b[name]) for name in a}


def add(a: Tensors, b: Tensors) -> dict[str, Tensor]:
    return _pair(torch.add, a, b)


def sub(a: Tensors, b: Tensors) -> dict[str, Tensor]:
    return _pair(torch.sub, a, b)


def scale(a: Tensors, factor: float) -> dict[str, Tensor]:
    return {name: value * factor for name, value in a.items()}


def mix(a: Tensors, b: Tensors, share: float) -> dict[str, Tensor]:
    """Return (1 - share)·a + share·b."""
    return _pair(lambda x, y: torch.lerp(x, y, share) if x.is_floating_point() else x, a, b)


def zeros(a: Tensors) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in a.items()}


def flat(a: Tensors) -> Tensor:
    """Return all floating-point values in the order of their tensors' names, float64 [n]."""
    return torch.cat([value.double().flatten() for _, value in sorted(a.items()) if value.is_floating_point()])


_STATISTICS = ("running_mean", "running_var")


def is_statistic(name: str) -> bool:
    """Return whether a tensor of this name holds running statistics of a normalisation layer."""
    return name.rpartition(".")[2] in _STATISTICS


def learned(a: Tensors) -> dict[str, Tensor]:
    """Return the tensors that gradients train."""
    return only(a, lambda name: not is_statistic(name))


def statistics(a: Tensors) -> dict[str, Tensor]:
    """Return the running statistics of normalisation layers, which are averaged and not optimised."""
    return only(a, is_statistic)


def only(a: Tensors, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    return {name: value for name, value in a.items() if keep(name)}


def add_prefix(a: Tensors, prefix: str) -> dict[str, Tensor]:
    """Return the same tensors with a prefix before each name, to store several models in one mapping."""
    return {prefix + name: value for name, value in a.items()}


def strip_prefix(a: Tensors, prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without the prefix."""
    return {name.removeprefix(prefix): value for name, value in a.items() if name.startswith(prefix)}


def mean(items: Iterable[tuple[Tensors, float]]) -> dict[str, Tensor]:
    """Return the weighted mean, accumulated in float64 in one pass, in the operands' type; O(one model) memory.

    Raises:
        ValueError: The sum of the weights is not positive.
    """
    total: dict[str, Tensor] = {}
    first: Tensors = {}
    weights = 0.0
    for tensors, weight in items:
        wide = {name: value.double() * weight for name, value in tensors.items()}
        total, first = (add(total, wide), first) if first else (wide, tensors)
        weights += weight
    if weights <= 0:
        raise ValueError("mean of no updates: every client failed or has zero weight")
    return {
        name: (total[name] / weights).to(value.dtype) if value.is_floating_point() else value for name, value in first.items()
    }


def layout_mismatch(came: Tensors, wanted: Tensors) -> str:
    """Return a description of the first tensor by name that differs in type or shape or is missing in one; empty if none."""
    names = came.keys() | wanted.keys()
    name = min((name for name in names if not _same(came.get(name), wanted.get(name))), default=None)
    return "" if name is None else f"tensor {name!r} is {_layout(came.get(name))}, expected {_layout(wanted.get(name))}"


def _same(came: Tensor | None, wanted: Tensor | None) -> bool:
    return came is not None and wanted is not None and came.dtype == wanted.dtype and came.shape == wanted.shape


def _layout(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def to(a: Tensors, device: str | torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in a.items()}


def finite(tensor: Tensor) -> bool:
    """Return whether the sum of all values is finite; it needs no copy. A tensor whose sum overflows counts as not finite."""
    return not tensor.is_floating_point() or math.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)))


def rows(table: Table) -> int:
    """Return the number of rows of a table."""
    return len(next(iter(table.values())))


def select(table: Table, index: Tensor | slice) -> dict[str, Tensor]:
    return {name: column[index] for name, column in table.items()}


def evenly_spaced(table: Table, count: int) -> dict[str, Tensor]:
    """Return at most `count` rows, evenly spaced over the table, which may be sorted by class."""
    return select(table, torch.linspace(0, rows(table) - 1, min(count, rows(table))).long())


def join(tables: Iterable[Table]) -> dict[str, Tensor]:
    """Return the rows of all tables, in order; raise `KeyError` if their column names differ."""
    tables = list(tables)
    if len({tuple(sorted(t)) for t in tables}) != 1:
        raise KeyError(f"column names differ: {[sorted(t) for t in tables]}")
    return {name: _joined([t[name] for t in tables]) for name in tables[0]}


def _joined(parts: list[Tensor]) -> Tensor:
    """Return torch.cat(parts), without a copy if the parts are adjacent in one storage (a mapped file)."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        same = (part.dtype, part.shape[1:], part.untyped_storage().data_ptr()) == (
            first.dtype, first.shape[1:], first.untyped_storage().data_ptr()
        )  # fmt: skip
        if not same or not part.is_contiguous() or part.data_ptr() != end:
            return torch.cat(parts)
        end += part.nbytes
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    return first.as_strided(shape, torch.empty(shape, device="meta").stride())


def apportion(counts: Tensor, wanted: int) -> Tensor:
    """Return `wanted` labels, sorted, in proportion to `counts` (largest remainder method), int64 [wanted]."""
    exact = counts.double() * wanted / counts.sum()
    base = exact.floor().long()
    base[(exact - base).sort(descending=True, stable=True).indices[: wanted - int(base.sum())]] += 1
    return torch.arange(len(counts)).repeat_interleave(base)


def sha256(a: Tensors) -> str:
    """Return the SHA-256 of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(a):
        value = a[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
