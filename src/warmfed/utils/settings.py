"""Builds settings, which are dataclasses, from tables of values, and checks each field."""

import dataclasses
import math
import types
import typing
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, TypeVar

from .errors import InputError, demand_text, suggest

T = TypeVar("T")


@cache
def _choices(cls: Any) -> dict[str, tuple[Any, ...]]:
    hints = typing.get_type_hints(cls)
    return {
        f.name: typing.get_args(hints[f.name])
        for f in dataclasses.fields(cls)
        if typing.get_origin(hints[f.name]) is typing.Literal
    }


def check_choices(settings: Any) -> None:
    """Raise `InputError` if a field declared as `Literal` has none of its choices."""
    cls: Any = type(settings)
    for name, choices in _choices(cls).items():
        _check_choice(name, getattr(settings, name), choices)


def _check_choice(where: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise InputError(f"{where} must be one of {', '.join(choices)}; got {value!r}")


def check_key(key: str, path: str, known: Collection[str], renamed: Mapping[str, str]) -> None:
    """Raise `InputError` if a key of a table is not known.

    Args:
        key: the key.
        path: dotted name of the table; empty for the whole configuration.
        known: keys of the table.
        renamed: today's keys by former ones, which the error names.
    """
    prefix = f"{path}." if path else ""
    if key in known:
        return
    if key in renamed:
        raise InputError(f"{prefix}{key} is now called {prefix}{renamed[key]}; rename it")
    raise InputError(f"unknown key {f'{prefix}{key}'!r}{suggest(key, sorted(known))}")


def construct(cls: type[T], values: Mapping[str, Any], path: str, skip: tuple[str, ...] = (), base: T | None = None) -> T:
    """Return an instance of a settings class from a table.

    The types of all fields are checked, and numbers must be finite and not negative. A key in the class's `RENAMED` is
    refused with its new name.

    Args:
        cls: the class.
        values: the table.
        path: dotted name of the table, for errors.
        skip: fields that the table cannot set.
        base: values of fields that the table does not set; None: the class's defaults.

    Raises:
        InputError: A key is unknown or renamed, or a value is not valid.
    """
    base = cls() if base is None else base
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name not in skip}  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        check_key(key, path, fields, getattr(cls, "RENAMED", {}))
        where = f"{path}.{key}" if path else key
        demand_texts(value, where)
        arguments[key] = _typed(fields[key], value, where, getattr(base, key))
    made = dataclasses.replace(base, **arguments)  # type: ignore[type-var]
    for key, value in arguments.items():  # after the class's own checks, whose errors are more precise
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and not 0 <= number < math.inf for number in numbers):
            raise InputError(f"{f'{path}.' if path else ''}{key} must be finite and not below zero; got {value!r}")
    return made


def check_seed(seed: int, where: str = "seed") -> None:
    """Raise `InputError` if a seed is below 0, or is not below 2**63 and so not an integer of TOML."""
    if not 0 <= seed < 2**63:
        raise InputError(f"{where} must be from 0 to 2**63 - 1; got {seed}")


def demand_texts(value: Any, where: str) -> None:
    """Raise `InputError` if a text within `value` is not UTF-8: it could not be written to config.toml."""
    if isinstance(value, str):
        demand_text(value, where)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            demand_text(str(key), where)
            demand_texts(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            demand_texts(inner, where)


def _typed(declared: Any, value: Any, where: str, default: Any) -> Any:
    if dataclasses.is_dataclass(declared) or typing.get_origin(declared) in (Mapping, dict, types.MappingProxyType):
        if not isinstance(value, Mapping):
            raise InputError(f"{where} must be a table of settings; got {value!r}")
        typed = dataclasses.is_dataclass(declared)
        return construct(typing.cast(type, declared), value, where, base=default) if typed else dict(value)
    if typing.get_origin(declared) is tuple and isinstance(value, list | tuple):
        return tuple(_typed(typing.get_args(declared)[0], item, where, None) for item in value)
    if declared is float and type(value) is int:
        return float(value)
    if typing.get_origin(declared) is typing.Literal:
        choices = typing.get_args(declared)
        if not isinstance(value, str):
            raise InputError(f"{where} must be of type str; got {value!r}")
        _check_choice(where, value, choices)
        return value
    if type(value) is not declared:
        wanted = getattr(declared, "__name__", str(declared))
        raise InputError(f"{where} must be of type {wanted}; got {value!r}")
    return value
