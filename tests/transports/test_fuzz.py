"""Mutated replies of every kind: rejected, or with a usable state. `benchmarks/fuzz_replies.py` runs more of them."""

import fuzz
import pytest

NAMES = ("fedavg", "fedbabu", "fednova", "scaffold", "fedproto", "fgl", "feddm-quant", "fedphd", "centralized", "warmfed")


@pytest.mark.parametrize("name", ["beside", *NAMES])
def test_no_answer_raises_or_spoils_the_server(name: str) -> None:
    cases = fuzz.beside() if name == "beside" else fuzz.of_algorithm(name)
    assert [case.take(case.data) for case in cases] == [""] * len(cases)  # honest ones are taken
    counts = fuzz.attack(cases, range(200 * (len(cases) if name == "beside" else 1)), seed=1)
    assert all(count["refused"] for count in counts.values())


def test_a_late_site_s_answer_cannot_spoil_the_server() -> None:
    cases = fuzz.of_algorithm("warmfed", late=True)
    assert [case.take(case.data) for case in cases] == [""]
    assert fuzz.attack(cases, range(100), seed=1)["warmfed-late/train"]["refused"]
