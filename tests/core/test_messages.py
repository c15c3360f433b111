"""The codec: it round-trips every kind of message and rejects everything else."""

import json
import pickle
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

import warmfed.algorithms  # declares the algorithms' messages
import warmfed.transports.client_state  # noqa: F401
from warmfed.algorithms.shared.base import Model
from warmfed.algorithms.warmfed import Adapter, ValidationVote
from warmfed.core import Empty, Reply
from warmfed.core.messages import KINDS, Message, _fields, decode, encode, kind, message, tensors_of
from warmfed.core.tensors import Tensors
from warmfed.utils.errors import InputError


@message("test_messages.Everything")
class Everything:
    """One field of every type that may be declared."""

    model: Tensors
    maybe: Tensors | None
    groups: Mapping[str, Tensors]
    counts: Mapping[str, float]
    whole: int
    real: float
    flag: bool
    text: str
    words: tuple[str, ...]
    numbers: tuple[float, ...]
    perhaps: float | None
    inner: Message
    none: Message | None


NAMES = st.text("ab/.%_é0 ", max_size=6)
SHAPES = st.lists(st.integers(0, 3), max_size=3)
TYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
TENSOR = st.builds(lambda shape, dtype: torch.arange(60).view(3, 4, 5).sum().expand(shape).to(dtype), SHAPES, TYPES)
TENSORS = st.dictionaries(NAMES, TENSOR, max_size=3)
REAL = st.floats(allow_nan=False)
INNER = st.one_of(st.just(Empty()), st.builds(Model, TENSORS))
STRATEGIES: dict[Any, st.SearchStrategy[Any]] = {
    Tensors: TENSORS,
    Tensors | None: st.none() | TENSORS,
    Mapping[str, Tensors]: st.dictionaries(NAMES, TENSORS, max_size=3),
    Mapping[str, float]: st.dictionaries(NAMES, REAL, max_size=3),
    int: st.integers(),
    float: REAL,
    float | None: st.none() | REAL,
    bool: st.booleans(),
    str: NAMES,
    tuple[str, ...]: st.lists(NAMES, max_size=3).map(tuple),
    tuple[int, ...]: st.lists(st.integers(), max_size=3).map(tuple),
    tuple[float, ...]: st.lists(REAL, max_size=3).map(tuple),
    Message: INNER,
    Message | None: st.none() | INNER,
}


def instances(cls: type) -> st.SearchStrategy[Message]:
    return st.builds(cls, **{name: STRATEGIES[declared] for name, declared in _fields(cls).items()})


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if type(a) in KINDS.values():
        return type(a) is type(b) and all(equal(getattr(a, name), getattr(b, name)) for name in _fields(type(a)))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("name", sorted(KINDS))
@settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_declared_kind_survives(name: str, data: st.DataObject) -> None:
    sent = data.draw(instances(KINDS[name]))
    wire = encode(sent)
    received = decode(wire, KINDS[name])
    assert equal(sent, received)
    assert encode(received) == wire


def test_the_algorithms_kinds_are_declared() -> None:
    assert {"averaging.Model", "warmfed.Server", "warmfed.Site", "core.Reply", "memories.Memory"} <= KINDS.keys()


def test_equal_messages_have_equal_bytes() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([5])
    assert encode(Model({"a": a, "b": b})) == encode(Model({"b": b.clone(), "a": a.clone()}))
    assert encode(Model({"a": a})) != encode(Model({"a": a.double()}))
    assert encode(ValidationVote({}, {"x": 1}, (2,))) == encode(ValidationVote({}, {"x": 1.0}, (2,)))


def test_views_and_shared_tensors_travel_by_value() -> None:
    whole = torch.arange(1000.0)
    sent = Model({"slice": whole[2:4], "turned": whole[:6].view(2, 3).T, "again": whole[2:4], "none": whole[:0]})
    wire = encode(sent)
    assert len(wire) < 1000
    assert decode(wire).model["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert decode(wire).model["again"].tolist() == [2, 3]


def test_groups_whose_names_hold_a_slash_stay_apart() -> None:
    one, two = torch.tensor([1]), torch.tensor([2])
    sent = Everything({}, None, {"a/b": {"c": one}, "a": {"b/c": two}}, {}, 1, 1.0, True, "", (), (), None, Empty(), None)
    groups = decode(encode(sent)).groups
    assert groups["a/b"]["c"].item() == 1
    assert groups["a"]["b/c"].item() == 2


def test_the_ledger_counts_the_tensors_of_inner_messages() -> None:
    reply = Reply(Model({"w": torch.zeros(1)}), Adapter({"up": torch.zeros(1)}, (0, 2)), 1.0, {})
    assert sorted(tensors_of(reply)) == ["message/model/w", "state/adapter/up"]


# what is refused


MODEL = Model({"w": torch.ones(2)})
VERDICT = ValidationVote({"0.0": torch.ones(1)}, {"0.0": 1.5}, (4,))


def forged(change: Any, sent: Message = MODEL) -> bytes:
    """Return a message with a changed header and changed tensors."""
    wire = encode(sent)
    size = int.from_bytes(wire[:8], "little")
    header, tensors = json.loads(json.loads(wire[8 : 8 + size])["__metadata__"]["warmfed"]), load(wire)
    header = change(header, tensors) or header
    return save(tensors, {"warmfed": json.dumps(header)})


def with_fields(**fields: Any) -> Any:
    return lambda header, tensors: header["fields"].update(fields)


def bottomless(depth: int) -> bytes:
    head = '{"kind": "core.Reply", "fields": {"state": null, "weight": 1.0, "metrics": {}, "message": '
    return save({}, {"warmfed": head * depth + "null" + "}}" * depth})


REFUSED = {
    "nothing": (b"", "damaged"),
    "text": (b"hello, is this a message?", "damaged"),
    "a pickle renamed": (pickle.dumps({"w": [1.0, 2.0]}), "damaged"),
    "truncated": (encode(Model({"w": torch.ones(9)}))[:-1], "damaged"),
    "half": (encode(Model({"w": torch.ones(9)}))[:30], "damaged"),
    "plain safetensors": (save({"w": torch.ones(2)}), "damaged or not a warmfed message"),
    "header that is no JSON": (save({}, {"warmfed": "{"}), "damaged"),
    "header that is a list": (forged(lambda h, t: [1]), "of kind"),
    "header that is a name": (forged(lambda h, t: "averaging.Model"), "of kind"),
    "unknown kind": (forged(lambda h, t: h.update(kind="os.system")), "os.system"),
    "kind that is no name": (forged(lambda h, t: h.update(kind=["averaging.Model"])), "of kind"),
    "no fields": (forged(lambda h, t: h.pop("fields")), "of kind"),
    "another field": (forged(with_fields(extra=1)), "has fields"),
    "a field less": (forged(lambda h, t: h["fields"].pop("model") and None), "has fields"),
    "missing tensor": (forged(lambda h, t: t.clear()), "'model' does not match"),
    "extra tensor": (forged(lambda h, t: t.update(evil=torch.ones(1))), "evil"),
    "tensor of no name": (forged(with_fields(model=[])), "undeclared tensors"),
    "an empty field": (forged(with_fields(model=None)), "it is empty"),
    "a number for tensors": (forged(with_fields(model=3)), "'model'"),
    "text for a number": (forged(with_fields(counts=["4"]), VERDICT), "expected int"),
    "a truth for a number": (forged(with_fields(counts=[True]), VERDICT), "expected int"),
    "half a count": (forged(with_fields(counts=[4.5]), VERDICT), "expected int"),
    "text in a mapping": (forged(with_fields(loss={"0.0": "many"}), VERDICT), "expected float"),
    "a list for a mapping": (forged(with_fields(loss=[1.0]), VERDICT), "'loss'"),
    "a number beyond all floats": (forged(with_fields(loss={"0.0": 10**400}), VERDICT), "'loss'"),
    "text for a list": (forged(with_fields(classes="01"), Adapter({}, (0,))), "expected a list"),
    "text in a list": (forged(with_fields(classes=["0"]), Adapter({}, (0,))), "expected int"),
    "an unknown inner kind": (forged(with_fields(message={"kind": "x", "fields": {}}), Reply(None, None, 1.0, {})), "kind 'x'"),
    "a bottomless message": (bottomless(5000), "damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_line(name: str) -> None:
    data, words = REFUSED[name]
    with pytest.raises(InputError, match=words) as error:
        decode(data, what="the reply of site 'ink'")
    assert str(error.value).startswith("the reply of site 'ink'")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_no_depth_of_nesting_breaks_the_reader() -> None:
    for depth in range(430, 510, 5):
        with suppress(InputError):
            assert isinstance(decode(bottomless(depth)), Reply)


def test_another_kind_than_expected_is_refused() -> None:
    with pytest.raises(InputError, match=r"is of kind 'core\.Nothing', expected averaging\.Model"):
        decode(encode(Empty()), Model)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_read_as_the_same_kind(place: int, flip: int) -> None:
    wire = bytearray(encode(VERDICT))
    wire[place % len(wire)] ^= flip
    with suppress(InputError):
        assert isinstance(decode(bytes(wire)), ValidationVote)


def test_two_kinds_of_one_name_are_an_error() -> None:
    def declare() -> None:
        @message("test_messages.Everything")
        class Everything:
            other: int

    with pytest.raises(TypeError, match=r"two message classes have the kind test_messages\.Everything"):
        declare()
    assert kind(Everything) == "test_messages.Everything"


@pytest.mark.parametrize("kind_of_number", [torch.float8_e4m3fn, torch.complex64])
def test_numbers_of_a_type_that_nobody_computes_with_are_refused(kind_of_number: torch.dtype) -> None:
    odd = Model({"w": torch.zeros(2).to(kind_of_number)})
    with pytest.raises(InputError, match=rf"tensor 'model/w' has the unsupported type {kind_of_number}"):
        decode(encode(odd))
