"""workers=, allow_other_workers= and resources=: what they mean, and which are refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_mem.errors import UnknownWorkerError
from celery_mem.graph.constraints import (
    ANYWHERE,
    constraint_of,
    is_per_key,
    names_of,
    select,
    why_nobody_may_run,
)

NAMES = st.text("abc@-1", min_size=1, max_size=6)
NODES = {
    "a@one": {"resources": {"GPU": 2}, "status": "running"},
    "b@one": {"resources": None, "status": "running"},
    "c@two": {"resources": {"GPU": 1, "RAM": 8}, "status": "running"},
}


def test_no_arguments_mean_anywhere() -> None:
    for workers in (None, [], (), set()):
        assert constraint_of(workers) == ANYWHERE
    assert constraint_of(resources={}) == ANYWHERE


def test_a_signature_is_json_with_sorted_names() -> None:
    signature = constraint_of(["b@h", "a@h", "b@h"], resources={"GPU": 2.0}).strict
    assert json.loads(signature) == {"workers": ["a@h", "b@h"], "resources": {"GPU": 2}}
    assert "2.0" not in signature


@given(st.lists(NAMES, min_size=1), st.dictionaries(NAMES, st.integers(1, 9)), st.randoms())
def test_equal_constraints_have_equal_signatures(names: list[str], amounts: dict[str, int], random) -> None:
    shuffled = list(names)
    random.shuffle(shuffled)
    items = list(amounts.items())
    random.shuffle(items)
    assert constraint_of(names, False, amounts) == constraint_of(set(shuffled), False, dict(items))


def test_other_workers_make_it_a_wish_but_resources_stay_a_need() -> None:
    assert constraint_of("a@h", True) == ("", "a@h")
    strict, prefer = constraint_of(["b@h", "a@h"], True, {"GPU": 1})
    assert prefer == "a@h\nb@h"
    assert json.loads(strict) == {"workers": [], "resources": {"GPU": 1}}


@pytest.mark.parametrize("workers", [1, [1], [b"a"], {"a": 1}, [None]])
def test_what_is_no_name_is_refused(workers: object) -> None:
    with pytest.raises(TypeError, match="workers"):
        constraint_of(workers)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", ["", ["a", ""], "a\nb"])
def test_what_cannot_be_a_name_is_refused(workers: object) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        names_of(workers)  # type: ignore[arg-type]


@pytest.mark.parametrize("resources", ["GPU", ["GPU"], {"GPU": "1"}, {1: 1}, {"GPU": True}, {"GPU": None}])
def test_resources_that_are_no_amounts_are_refused(resources: object) -> None:
    with pytest.raises(TypeError, match="resources"):
        constraint_of(resources=resources)  # type: ignore[arg-type]


@pytest.mark.parametrize("amount", [0, -1, float("nan"), float("inf")])
def test_amounts_are_above_zero(amount: float) -> None:
    with pytest.raises(ValueError, match="above zero"):
        constraint_of(resources={"GPU": amount})


def test_other_workers_is_yes_or_no() -> None:
    with pytest.raises(TypeError, match="allow_other_workers"):
        constraint_of("a", "yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, False),
        ("a", False),
        (["a"], False),
        ({"GPU": 1}, False),
        ({}, False),
        ({"key": "worker"}, True),
        ({"key": ["a", "b"]}, True),
        ({("x", 0): {"GPU": 1}}, True),
    ],
)
def test_a_dict_for_each_part_is_told_from_amounts_by_name(value: object, expected: bool) -> None:
    assert is_per_key(value) is expected


def test_a_host_means_all_its_nodes() -> None:
    assert select("one", NODES) == ["a@one", "b@one"]
    assert select(["c@two", "a@one"], NODES) == ["a@one", "c@two"]
    assert select(None, NODES) == list(NODES)


def test_a_worker_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(UnknownWorkerError, match="'d@two'; there are: a@one, b@one, c@two"):
        select(["a@one", "d@two"], NODES)


@pytest.mark.parametrize(
    ("workers", "resources", "reason"),
    [
        (None, None, ""),
        ("a@one", {"GPU": 2}, ""),
        ("two", {"RAM": 8, "GPU": 1}, ""),
        ("d@two", None, "no worker is called d@two; there are: a@one, b@one, c@two"),
        (
            None,
            {"GPU": 3},
            "it needs GPU 3, and the workers have a@one: GPU 2; b@one: nothing declared; c@two",
        ),
        (
            "one",
            {"RAM": 1},
            "it needs RAM 1, and the workers named have a@one: GPU 2; b@one: nothing declared",
        ),
    ],
)
def test_why_nobody_may_run_a_task_is_said_in_words(workers: object, resources: object, reason: str) -> None:
    found = why_nobody_may_run(constraint_of(workers, False, resources).strict, NODES)  # type: ignore[arg-type]
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_a_worker_about_to_leave_runs_nothing_new() -> None:
    nodes = {"a@one": {"status": "retiring"}}
    assert why_nobody_may_run(constraint_of("a@one").strict, nodes) == "a@one is about to leave"
    assert "there are: none" in why_nobody_may_run(constraint_of("a@one").strict, {})
