"""Who is called for ready work: waiting slots by a wake-up, others by a ticket; and what a slot may steal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from celery_mem.state.audit import audit, read
from celery_mem.state.store import Done, NewData, NewTask, Step, Store

A, B = "a@one", "b@two"
GPU = '{"resources":{"GPU":1}}'
ONLY_B = '{"workers":["two"]}'
SMALL, HUGE = 9, 50_000_000  # bytes: quick to move, and slower than to wait for the next slot


@pytest.fixture
def space(make_store: Callable[..., Store]) -> Iterator[Store]:
    """Two nodes of two slots each that need 5 ms for a task; `x` has a copy on the first of them."""
    store = make_store(ticket_lease=30)
    for node in (A, B):
        store.heartbeat(node, queue="q", slots="2", pace="5")
    store.renew_client("alice", join=True)
    put(store, "x", HUGE)
    yield store
    assert audit(store) == []


def put(store: Store, key: str, nbytes: int) -> None:
    store.put("alice", 1, [NewData(key, nbytes, "ndarray", "n", f"token of {key}", place=A)])


def submit(store: Store, *keys: str, deps: Sequence[str] = (), constraint: str = "") -> list[str]:
    """Submit tasks; return the queues of the tickets that call for them."""
    tasks = [
        NewTask(key, "f", b"call", deps=deps, constraint=constraint, order=i) for i, key in enumerate(keys)
    ]
    return [ticket.queue for ticket in store.submit("alice", 2, tasks, [("f", b"code")])[1]]


def keys_of(step: Step) -> list[str]:
    return [taken.key for taken in step.taken]


def wait_for_work(store: Store, *slots: str) -> None:
    """Slots, named like node and number, ask for work and get none."""
    for slot in slots:
        assert store.step(slot, slot[:-1], ticket="0", want=1).taken == []


def pass_time(store: Store, ms: int) -> None:
    assert store.now_ms is not None
    store.now_ms += ms


def idle(store: Store) -> set[str]:
    return set(read(store).idle)


def test_work_for_a_node_calls_its_idle_slots_then_the_rest_of_its_slots_by_tickets_of_its_own(space):
    wait_for_work(space, A + "1", B + "1")

    assert submit(space, "k0", "k1", deps=["x"]) == [space.keys.own_queue(A)]
    assert idle(space) == {B + "1"}


def test_a_node_never_gets_more_tickets_than_it_has_slots(space):
    assert submit(space, *"abcde", deps=["x"]) == [space.keys.own_queue(A)] * 2
    assert submit(space, "f", deps=["x"]) == []


def test_work_that_others_may_steal_calls_them_too(space):
    put(space, "small", SMALL)

    assert submit(space, *"abcde", deps=["small"]) == [space.keys.own_queue(A)] * 2 + ["q"] * 2


def test_a_ticket_that_was_taken_makes_room_for_another(space):
    (first,) = space.submit("alice", 2, [NewTask("k", "f", b"", deps=["x"])], [("f", b"code")])[1]
    space.step(A + "1", A, ticket=first.id, want=1)

    assert read(space).node_tickets == set()
    assert submit(space, "k2", deps=["x"]) == [space.keys.own_queue(A)]


def test_work_under_a_constraint_calls_only_nodes_that_meet_it(space):
    wait_for_work(space, A + "1")

    assert submit(space, "a", "b", "c", constraint=ONLY_B) == [space.keys.own_queue(B)] * 2
    assert submit(space, "d", constraint=GPU) == []
    assert idle(space) == {A + "1"}


def test_a_task_that_ends_calls_a_slot_for_the_next_that_needs_what_it_used(space):
    space.heartbeat(A, resources='{"GPU":1}')
    submit(space, "a", "b", constraint=GPU)
    (first,) = space.step(A + "1", A, ticket="0").taken
    wait_for_work(space, A + "2")
    reply = space.step(A + "1", A, want=0, done=[Done("a", first.attempt, 1, "int", "v", b"1")])

    assert (reply.tickets, idle(space)) == ([], set())
    assert keys_of(space.step(A + "2", A, mode="i")) == ["b"]


def test_a_slot_that_leaves_calls_others_for_what_waits_for_its_node(space):
    submit(space, "a", "b")
    (first,) = space.step(A + "1", A, ticket="0").taken
    assert space.step(A + "2", A, ticket="0").taken != []
    assert submit(space, "k", deps=["x"]) == []
    reply = space.step(A + "1", A, want=0, mode="q", back=[("a", first.attempt)])

    assert sorted(ticket.queue for ticket in reply.tickets) == sorted(["q", space.keys.own_queue(A)])


def test_lost_tickets_of_a_node_are_sent_again_when_their_lease_is_over(space):
    submit(space, "k0", "k1", deps=["x"])
    assert space.call_tickets() == []  # they are on their way
    pass_time(space, 30_001)

    assert [ticket.queue for ticket in space.call_tickets()] == [space.keys.own_queue(A)] * 2


def test_a_node_that_leaves_its_tickets_lie_may_be_stolen_from(space):
    submit(space, "k", deps=["x"])
    assert space.step(B + "1", B, ticket="0").taken == []
    pass_time(space, 1000)

    assert keys_of(space.step(B + "1", B, mode="i")) == ["k"]


def test_stealing_begins_where_the_last_of_a_queue_waits_longer_than_it_takes_to_move(space):
    space.heartbeat(A, pace="100")
    submit(space, "k0", deps=["x"])
    assert space.step(B + "1", B, ticket="0").taken == []  # 50 ms, as there are two slots, and 68
    submit(space, "k1", deps=["x"])

    assert keys_of(space.step(B + "1", B, mode="i")) == ["k1"]


def test_the_last_of_those_that_are_cheapest_to_move_is_stolen(space):
    space.heartbeat(A, pace="1000")
    put(space, "small", SMALL)
    submit(space, "k0", "k1", deps=["small"])
    submit(space, "k2", deps=["x"])

    assert [keys_of(space.step(B + "1", B)) for _ in range(3)] == [["k1"], ["k0"], ["k2"]]


def test_what_a_slots_own_report_makes_ready_is_taken_before_what_waited_for_its_node(space):
    submit(space, "made")
    (made,) = space.step(A + "1", A, ticket="0").taken
    submit(space, "waited", deps=["x"])
    submit(space, "next", deps=["made"])
    done = [Done("made", made.attempt, SMALL, "ndarray", "n", made.attempt)]

    assert keys_of(space.step(A + "1", A, done=done)) == ["next"]


def test_a_paused_node_takes_nothing_and_is_stolen_from(space):
    submit(space, "k", deps=["x"])
    space.heartbeat(A, status="paused")

    assert space.step(A + "1", A, mode="p").taken == []
    assert keys_of(space.step(B + "1", B)) == ["k"]


def test_a_slot_that_keeps_results_on_its_node_takes_nothing_while_that_is_not_alive(space):
    # A result that it brought would be refused, and the task would run again and again.
    submit(space, "y")
    assert space.step("c1", "c@three", ticket="0", mode="m").taken == []
    assert idle(space) == set()
    space.heartbeat("c@three", slots="1")
    assert keys_of(space.step("c1", "c@three", mode="m")) == ["y"]
