"""Mutated configs, plans, run directories and checkpoints: a sentence or a right result, within time and memory.

`python -m benchmarks.fuzz` tries thousands.
"""

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import TARGETS, Hang, Specimens, flip, mutate, nodes, time_limit, try_one

EXAMPLES = {name: 40 if name in ("plan", "run", "tensors", "index") else 120 for name in TARGETS}


@pytest.fixture(scope="module")
def specimens(tmp_path_factory) -> Specimens:
    return Specimens(tmp_path_factory.mktemp("specimens"))


@pytest.mark.parametrize("name", TARGETS)
def test_refused_or_right(specimens, name):
    outcomes: set[str] = set()

    @settings(max_examples=EXAMPLES[name], deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def attempt(random: Random) -> None:
        outcomes.add(try_one(TARGETS[name], specimens, random))

    attempt()
    assert "refused" in outcomes


@pytest.mark.parametrize(
    "name", ["plan", "profile", "run", "quantization", "model_config", "header", "tensors", "index"]
)
def test_what_is_not_mutated_is_accepted(specimens, name, monkeypatch):
    monkeypatch.setattr("benchmarks.fuzz.mutate", lambda value, random: value)
    monkeypatch.setattr("benchmarks.fuzz.flip", lambda data, random: data)
    assert try_one(TARGETS[name], specimens, Random(0)) == "accepted"


def test_a_wrong_result_is_seen(specimens, monkeypatch):
    monkeypatch.setattr("benchmarks.fuzz.mutate", lambda value, random: value)
    monkeypatch.setattr(specimens, "logits", specimens.logits + 1)
    with pytest.raises(AssertionError):
        try_one(TARGETS["quantization"], specimens, Random(0))


def test_slow_and_large_examples_are_seen(specimens):
    def sleeps(*_: object) -> None:
        while True:
            pass

    def allocates(*_: object) -> None:
        bytearray(2 * 10**9)

    with pytest.raises(Hang), time_limit(0.1):
        sleeps()
    with pytest.raises(MemoryError):
        try_one(allocates, specimens, Random(0))


@given(st.randoms(use_true_random=False))
def test_mutations_change_copies(random):
    value = {"a": [1, {"b": "c"}], "d": None}
    mutate(value, random)
    assert value == {"a": [1, {"b": "c"}], "d": None}
    assert isinstance(flip(b"some bytes", random), bytes)


def test_nodes_are_all_there_are():
    value = {"a": [1, {"b": "c"}], "d": None}
    assert [container[key] for container, key in nodes(value)] == [[1, {"b": "c"}], 1, {"b": "c"}, "c", None]
