"""Plans: which copies are made, moved and given up, for any spread of results over nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_mem.coordinator.plans import (
    DEAD_BAND,
    Copy,
    Drop,
    Move,
    Node,
    nodes_of,
    plan_balance,
    plan_copies,
    plan_rescue,
    plan_surplus,
    plan_trim,
)
from celery_mem.state.store import REDIS, Location

NAMES = ("a", "b", "c", "d")


def result(key: str, nbytes: int, *places: str, copies: int = 1, on: Sequence[str] = ()) -> Location:
    return Location(key, "memory", nbytes, f"t{key}", "", places, copies, tuple(on))


@st.composite
def spreads(draw: st.DrawFn, redis: bool = True) -> list[Location]:
    """Results of all sizes with copies anywhere."""
    found = []
    for i in range(draw(st.integers(0, 12))):
        places = draw(st.sets(st.sampled_from((*NAMES, REDIS) if redis else NAMES), min_size=1))
        wanted = draw(st.integers(1, 4))
        on = draw(st.sets(st.sampled_from(NAMES), max_size=2))
        found.append(
            result(f"k{i}", draw(st.integers(0, 100)), *sorted(places), copies=wanted, on=sorted(on))
        )
    return found


def loads_of(results: Iterable[Location]) -> dict[str, int]:
    return {node: sum(r.nbytes for r in results if node in r.places) for node in NAMES}


@st.composite
def node_sets(draw: st.DrawFn) -> dict[str, Node]:
    nodes = {}
    for name in draw(st.sets(st.sampled_from(NAMES))):
        stays = draw(st.booleans())
        nodes[name] = Node(
            draw(st.integers(0, 300)), stays, stays and draw(st.booleans()), draw(st.integers(0, 200))
        )
    return nodes


# --- copies -------------------------------------------------------------------------------------------------


@given(spreads(), node_sets())
def test_copies_go_where_they_are_wanted_and_are_not_yet(
    results: list[Location], nodes: dict[str, Node]
) -> None:
    plan = plan_copies(results, nodes)
    assert len({(c.key, c.target) for c in plan}) == len(plan)
    takers = {name for name, node in nodes.items() if node.takes}
    for r in results:
        targets = {c.target for c in plan if c.key == r.key}
        assert not targets & set(r.places)
        assert targets <= takers
        after = {p for p in (*r.places, *targets) if p in nodes and nodes[p].stays}
        assert after >= set(r.copies_on) & takers
        assert len(after) >= r.copies or takers <= after
        if targets - set(r.copies_on):
            assert len(after) <= r.copies, "no more than was asked for"


def test_copies_go_to_the_nodes_with_the_fewest_bytes() -> None:
    nodes = {"a": Node(50), "b": Node(30), "c": Node(10), "d": Node(0, stays=True, takes=False)}
    plan = plan_copies([result("x", 15, "a", copies=2), result("y", 15, "a", copies=2)], nodes)
    assert plan == [Copy("x", "tx", 15, "c"), Copy("y", "ty", 15, "c")]
    plan = plan_copies([result("x", 40, "a", copies=2), result("y", 40, "a", copies=2)], nodes)
    assert [c.target for c in plan] == ["c", "b"]


def test_a_copy_on_a_node_about_to_leave_does_not_count() -> None:
    nodes = {"a": Node(5, stays=False, takes=False), "b": Node(5), "c": Node(0)}
    assert plan_copies([result("x", 5, "a", "b", copies=2)], nodes) == [Copy("x", "tx", 5, "c")]


def test_what_has_no_copies_needs_none() -> None:
    nodes = {"a": Node(0), "b": Node(0)}
    assert (
        plan_copies([Location("x", "waiting", copies=2), Location("y", "memory", 8, copies=2)], nodes) == []
    )


@given(spreads(), node_sets(), st.sets(st.sampled_from(NAMES), min_size=1))
def test_of_all_that_only_leaving_nodes_have_one_copy_is_made(
    results: list[Location], nodes: dict[str, Node], leaving: set[str]
) -> None:
    plan = plan_rescue(results, leaving, nodes)
    assert [c.key for c in plan] == [r.key for r in results if set(r.places) <= leaving]
    takers = {name for name, node in nodes.items() if node.takes} - leaving
    assert all(c.target in takers if takers else c.target == REDIS for c in plan)


@given(spreads(), node_sets())
def test_surplus_copies_go_only_where_memory_is_short_and_never_below_the_number_wanted(
    results: list[Location], nodes: dict[str, Node]
) -> None:
    plan = plan_surplus(results, nodes)
    check_drops(plan, results, nodes)
    for name, node in nodes.items():
        sizes = [d.nbytes for d in plan if d.place == name]
        assert not sizes or sum(sizes[:-1]) < node.excess, "no more than needed"


@given(spreads(), node_sets())
def test_trimming_leaves_the_number_wanted(results: list[Location], nodes: dict[str, Node]) -> None:
    plan = plan_trim(results, nodes)
    check_drops(plan, results, nodes)
    for r in results:
        left = {p for p in r.places if p in nodes} - {d.place for d in plan if d.key == r.key}
        assert len(left) <= r.copies or left <= set(r.copies_on) or len(left) <= len(set(r.copies_on) | {0})


def check_drops(plan: list[Drop], results: list[Location], nodes: dict[str, Node]) -> None:
    by_key = {r.key: r for r in results}
    assert len({(d.key, d.place) for d in plan}) == len(plan)
    for key in {d.key for d in plan}:
        r = by_key[key]
        dropped = {d.place for d in plan if d.key == key}
        assert dropped <= set(r.places)
        assert not dropped & set(r.copies_on)
        left = set(r.places) - dropped
        assert left, "the last copy stays"
        on_nodes = {p for p in left if p in nodes}
        assert len(on_nodes) >= r.copies or (r.copies == 1 and not r.copies_on and REDIS in left)


def test_the_largest_surplus_copies_go_first() -> None:
    nodes = {"a": Node(100, excess=30), "b": Node(100)}
    results = [result("x", 10, "a", "b"), result("y", 40, "a", "b"), result("z", 50, "a", "b", copies=2)]
    assert plan_surplus(results, nodes) == [Drop("y", "ty", 40, "a")]


# --- balance ------------------------------------------------------------------------------------------------


@given(spreads(redis=False), st.sets(st.sampled_from(NAMES), min_size=1), st.integers(0, 100))
def test_balancing_ends_within_the_band_or_where_no_move_helps(
    results: list[Location], nodes: set[str], fixed: int
) -> None:
    loads = {n: nbytes for n, nbytes in loads_of(results).items() if n in nodes}
    loads[min(loads)] += fixed  # what must not move
    plan = plan_balance(results, loads)
    by_key = {r.key: r for r in results}
    places = {r.key: set(r.places) for r in results}
    after = dict(loads)
    for move in plan:
        r = by_key[move.key]
        assert move.source in r.places
        assert move.source in nodes
        assert move.source not in r.copies_on
        assert move.target in nodes
        assert move.target not in r.places, "a node that has it needs no other"
        places[move.key].remove(move.source)
        places[move.key].add(move.target)
        after[move.source] -= move.nbytes
        after[move.target] += move.nbytes
    assert len({(m.key, m.source) for m in plan}) == len(plan)
    assert all(len(places[r.key]) == len(r.places) for r in results)
    assert max(after.values()) <= max(loads.values())
    mean = sum(after.values()) / len(after)
    if all(mean * (1 - DEAD_BAND) <= nbytes <= mean * (1 + DEAD_BAND) for nbytes in after.values()):
        return
    for r in results:
        for source in (places[r.key] & nodes) - set(r.copies_on):
            for target in nodes - places[r.key]:
                helps = after[source] > mean > after[target] and r.nbytes < after[source] - after[target]
                assert not (helps and r.nbytes), (r.key, source, target, after)


def test_equal_results_are_spread_evenly() -> None:
    results = [result(f"k{i}", 10, "a") for i in range(8)]
    plan = plan_balance(results, {"a": 80, "b": 0})
    assert len(plan) == 4
    assert {(m.source, m.target) for m in plan} == {("a", "b")}


def test_nodes_that_are_nearly_even_are_left_alone() -> None:
    results = [*(result(f"a{i}", 1, "a") for i in range(104)), *(result(f"b{i}", 1, "b") for i in range(96))]
    assert plan_balance(results, {"a": 104, "b": 96}) == []


def test_only_what_may_move_moves() -> None:
    results = [result("x", 10, "a"), result("y", 10, "a")]
    plan = plan_balance(results, {"a": 20, "b": 0}, lambda r: r.key == "y")
    assert plan == [Move("y", "ty", 10, "a", "b")]


@pytest.mark.parametrize("loads", [{}, {"a": 10}, {"a": 0, "b": 0}])
def test_there_may_be_nothing_to_balance(loads: dict[str, int]) -> None:
    assert plan_balance([result("x", 10, "a")] if loads.get("a") else [], loads) == []


def test_ten_thousand_results_are_planned_in_a_moment() -> None:
    results = [result(f"k{i}", 1 + i % 97, "a") for i in range(10_000)]
    total = sum(r.nbytes for r in results)
    assert len(plan_balance(results, {"a": total, "b": 0, "c": 0, "d": 0})) > 1_000


# --- what nodes say -----------------------------------------------------------------------------------------


def test_nodes_are_read_from_what_they_say_of_themselves() -> None:
    memory = {"files": 600, "live": 100, "spilled": 50, "limit": 1000, "process": 5}
    infos = {
        "a": {"dir": "/x", "memory": memory, "status": "running"},
        "b": {"dir": "/x", "memory": memory, "status": "paused"},
        "c": {"dir": "/x", "status": "retiring"},
        "d": {"slots": 2},
    }
    assert nodes_of(infos, 0.6) == {
        "a": Node(750, True, True, 100),
        "b": Node(750, True, False, 100),
        "c": Node(0, False, False, 0),
        "d": Node(0, False, False, 0),
    }
