"""Messages: frozen dataclasses of tensors and scalars. The declaration is the wire format.

One codec serves the wire, the client states and the checkpoints. Tensors are stored as safetensors; scalars and the
message's kind are stored in its JSON header. Decoding validates every input: the kind must be declared in this process,
and the fields must be exactly the declared ones, with their types. Pickle is not used.
"""

import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, TypeVar, dataclass_transform, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..utils.errors import InputError
from .tensors import Tensors


class Message(Protocol):
    """An instance of a class declared with `@message`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


_NAMES: dict[type, str] = {}
KINDS: dict[str, type] = {}
"""Classes of all messages declared in this process, by kind: `fedavg.Model`."""

_HEADER = "warmfed"
T = TypeVar("T")
M = TypeVar("M", bound=Message)


@dataclass_transform(frozen_default=True)
def message(name: str) -> Callable[[type[T]], type[T]]:
    """Declare a class as a message of kind `name`: a frozen dataclass.

    Fields have one of these types (or `| None`): `Tensors`, `Mapping[str, Tensors]`, `int`, `float`, `bool`, `str`,
    `tuple[str, ...]`, `tuple[float, ...]`, `Mapping[str, float]`, and `Message` (another message).

    Args:
        name: the kind on the wire, in checkpoints and in ledgers ("fedavg.Model"). It is part of the format: do not change it
            if the class or its file is renamed.
    """

    def declare(cls: type[T]) -> type[T]:
        frozen = dataclasses.dataclass(frozen=True, eq=False)(cls)
        if name in KINDS and KINDS[name].__qualname__ != frozen.__qualname__:
            raise TypeError(f"two message classes have the kind {name}; choose another name")
        KINDS[name], _NAMES[frozen] = frozen, name
        return frozen

    return declare


def kind(cls: type) -> str:
    """Return the kind of a declared message class, or the name of any other class."""
    return _NAMES.get(cls, cls.__name__)


@functools.cache
def _fields(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    # a type variable is the message type of a reply
    return {f.name: Message if isinstance(hints[f.name], TypeVar) else hints[f.name] for f in dataclasses.fields(cls)}


def _flatten(obj: Message, prefix: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for field, declared in _fields(obj.__class__).items():
        value, path = getattr(obj, field), prefix + field
        if value is None:
            scalars[field] = None
        elif _holds(declared, Tensors):
            scalars[field] = sorted(value)
            tensors |= {f"{path}/{name}": tensor for name, tensor in value.items()}
        elif _holds(declared, Mapping[str, Tensors]):
            scalars[field] = {group: sorted(named) for group, named in value.items()}
            tensors |= {f"{path}/{_group(g)}/{name}": tensor for g, named in value.items() for name, tensor in named.items()}
        elif _holds(declared, Mapping[str, float]):
            scalars[field] = {name: float(number) for name, number in value.items()}
        elif _holds(declared, Message):
            inner, fields = _flatten(value, f"{path}/")
            tensors |= inner
            scalars[field] = {"kind": kind(type(value)), "fields": fields}
        elif _holds(declared, tuple[float, ...]):
            scalars[field] = [float(number) for number in value]
        else:
            scalars[field] = float(value) if _holds(declared, float) else value
    return tensors, scalars


def _options(declared: Any) -> tuple[Any, ...]:
    if typing.get_origin(declared) in (typing.Union, types.UnionType):
        return typing.get_args(declared)
    return (declared,)


def _holds(declared: Any, wanted: Any) -> bool:
    return wanted in _options(declared)


def _group(name: str) -> str:
    # {"a/b": {"c": …}} and {"a": {"b/c": …}} must have different paths
    return name.replace("%", "%25").replace("/", "%2F")


def encode(obj: Message) -> bytes:
    """Return the bytes of a message; equal messages have equal bytes."""
    tensors, scalars = _flatten(obj)
    header = json.dumps({"kind": kind(type(obj)), "fields": scalars}, sort_keys=True)
    seen: set[int] = set()
    found: bytes = save({name: _own(tensor, seen) for name, tensor in tensors.items()}, {_HEADER: header})
    return found


def _own(tensor: torch.Tensor, seen: set[int]) -> torch.Tensor:
    # safetensors refuses tensors that share storage, such as slices of one synthetic set
    plain = tensor.detach().cpu().contiguous()
    if plain.untyped_storage().nbytes() != plain.nbytes or plain.data_ptr() in seen:
        plain = plain.clone()
    seen.add(plain.data_ptr())
    return plain


def _header(data: bytes) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    found: dict[str, Any] = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_HEADER])
    return found


def kind_of(data: bytes) -> str:
    """Return the kind that the header declares; empty if the bytes are not a message."""
    try:
        return str(_header(data)["kind"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


@overload
def decode(data: bytes, expect: None = None, what: str = ...) -> Message: ...
@overload
def decode(data: bytes, expect: type[M], what: str = ...) -> M: ...
def decode(data: bytes, expect: type | None = None, what: str = "message") -> Any:
    """Return the message that these bytes encode.

    Args:
        expect: class of the message; None: any declared class.
        what: description of the bytes for the error ("the checkpoint of site 'ink'").

    Raises:
        InputError: The bytes are not a message (a pickle, a truncated file), the kind is not declared, or the fields do not
            match their declaration.
    """
    try:
        flat = load(data)
        header = _header(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{what} is damaged or not a warmfed message ({reason}); send or restore it again") from error
    for name, tensor in flat.items():
        if tensor.dtype not in _TYPES:
            raise InputError(f"{what}: tensor {name!r} has the unsupported type {tensor.dtype}; it is refused")
    if expect is not None and isinstance(header, dict) and header.get("kind") != kind(expect):
        raise InputError(f"{what} is of kind {header.get('kind')!r}, expected {kind(expect)}; {_VERSIONS}")
    try:
        obj = _build(header, flat, "", what)
    except RecursionError as error:
        raise InputError(f"{what} is damaged: its messages are nested too deeply; it is refused") from error
    if flat:
        raise InputError(f"{what} holds undeclared tensors: {', '.join(sorted(flat)[:3])}; it is refused")
    return obj


_TYPES = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
}  # fmt: skip
_VERSIONS = "install the same version of warmfed on both sides"


def _build(header: Any, flat: dict[str, torch.Tensor], prefix: str, what: str) -> Message:
    name, fields = (header.get("kind"), header.get("fields")) if isinstance(header, dict) else (header, None)
    if not isinstance(name, str) or name not in KINDS or not isinstance(fields, dict):
        raise InputError(f"{what} is of kind {name!r}, expected a declared kind; {_VERSIONS}")
    cls, scalars = KINDS[name], fields
    declared = _fields(cls)
    if declared.keys() != scalars.keys():
        raise InputError(f"{what} of kind {name} has fields {sorted(scalars)}, expected {sorted(declared)}; {_VERSIONS}")
    values: dict[str, Any] = {}
    for field, kind_of in declared.items():
        try:
            values[field] = _read(kind_of, scalars[field], flat, prefix + field, what)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise InputError(
                f"{what} of kind {name}: field {field!r} does not match its declaration ({error}); send or restore it again"
            ) from error
    found: Message = cls(**values)
    return found


def _read(declared: Any, value: Any, flat: dict[str, torch.Tensor], path: str, what: str) -> Any:
    if value is None:
        if not _holds(declared, type(None)):
            raise TypeError("it is empty")
        return None
    if _holds(declared, Message):
        return _build(value, flat, f"{path}/", what)
    if _holds(declared, Tensors):
        return {name: flat.pop(f"{path}/{name}") for name in value}
    if _holds(declared, Mapping[str, Tensors]):
        return {group: {name: flat.pop(f"{path}/{_group(group)}/{name}") for name in names} for group, names in value.items()}
    if _holds(declared, Mapping[str, float]):
        return {name: _scalar(float, number) for name, number in value.items()}
    plain = next(option for option in _options(declared) if option is not type(None))
    if typing.get_origin(plain) is tuple:
        member = typing.get_args(plain)[0]
        if not isinstance(value, list):
            raise TypeError(f"expected a list, got {value!r}")
        return tuple(_scalar(member, item) for item in value)
    return _scalar(plain, value)


def _scalar(declared: type, value: Any) -> Any:
    if declared is float and type(value) is int:
        return float(value)
    if type(value) is not declared:
        raise TypeError(f"expected {declared.__name__}, got {value!r}")
    return value


def tensors_of(obj: Message) -> dict[str, torch.Tensor]:
    """Return all tensors of a message by `field/name` (or `field/group/name`)."""
    return _flatten(obj)[0]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
