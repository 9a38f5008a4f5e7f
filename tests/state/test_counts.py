"""What the scripts count for those who watch: frees, recoveries, steals, and how old a ticket is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from celery_mem.state.audit import audit
from celery_mem.state.inspect import namespace_status
from celery_mem.state.keys import COUNTS
from celery_mem.state.store import Done, Failed, NewData, NewTask, Step, Store

A, B = "a@one", "b@two"
SLOT = f"{A}|1-1.1"


@pytest.fixture
def space(make_store: Callable[..., Store]) -> Iterator[Store]:
    """Two nodes of two slots each that need 5 ms for a task."""
    store = make_store()
    for node in (A, B):
        store.heartbeat(node, queue="q", slots="2", pace="5")
    store.renew_client("alice", join=True)
    yield store
    assert audit(store) == []


def submit(store: Store, *tasks: NewTask) -> list[str]:
    """Submit; return the ids of the tickets."""
    return [ticket.id for ticket in store.submit("alice", 2, tasks, [("f", b"code")])[1]]


def new(key: str, *deps: str, retries: int = 0) -> NewTask:
    return NewTask(key, "f", b"call", deps=deps, retries=retries)


def take(store: Store, slot: str = SLOT) -> Step:
    return store.step(slot, slot.partition("|")[0], want=10)


def finish(store: Store, step: Step, kind: str = "v") -> None:
    """Report that all that a step gave is done, with large results where `kind` is n."""
    nbytes, data = (3, b"abc") if kind == "v" else (1 << 20, "1.token")
    done = [Done(t.key, t.attempt, nbytes, "bytes", kind, data) for t in step.taken]
    assert store.step(SLOT, A, want=0, done=done).stale == []


def counted(store: Store) -> dict[str, int]:
    counts = namespace_status(store)["counts"]
    return {name: counts.pop(name) for name in COUNTS} | counts


NOTHING = dict.fromkeys(COUNTS, 0)


def test_a_result_that_nobody_wants_any_more_is_counted_as_freed(space: Store) -> None:
    submit(space, new("x"), new("y"))
    finish(space, take(space))
    assert counted(space) == NOTHING

    space.release("alice", ["x", "y"])
    assert counted(space) == NOTHING | {"freed": 2}


def test_what_is_made_again_after_a_loss_is_counted_with_the_inputs_it_needs(space: Store) -> None:
    submit(space, new("x")._replace(hold=False), new("y", "x"))
    finish(space, take(space), kind="n")
    finish(space, take(space), kind="n")
    assert counted(space) == NOTHING | {"freed": 1}  # x, as y is there

    space.lose(A, [("y", "1.token")])
    assert [t.key for t in take(space).taken] == ["x"]
    assert counted(space) == NOTHING | {"freed": 1, "remade": 2}


def test_to_try_a_failed_task_again_is_no_recovery(space: Store) -> None:
    submit(space, new("x"), new("y", "x"))
    (x,) = take(space).taken
    space.step(SLOT, A, want=0, failed=[Failed("x", x.attempt, b"error")])
    space.retry("alice", ["y"])
    assert [t.key for t in take(space).taken] == ["x"]
    assert counted(space) == NOTHING


def test_what_ran_in_a_slot_that_died_is_counted_but_for_what_errs_with_it(space: Store) -> None:
    submit(space, *map(new, "abc"))
    owned = [t.key for _ in range(3) for t in take(space).taken]
    assert sorted(owned) == ["a", "b", "c"]

    space.abandon_slot(SLOT, A, "SIGKILL", {"a": b"error"})
    assert counted(space) == NOTHING | {"rerun": 2}


def test_a_steal_is_counted(space: Store) -> None:
    space.put("alice", 1, [NewData("big", 9, "ndarray", "n", "token", place=A)])
    submit(space, *(new(f"k{n}", "big") for n in range(10)))
    assert len(take(space, f"{B}|1-1.1").taken) == 1
    assert counted(space) == NOTHING | {"stolen": 1}


def test_a_step_tells_how_old_its_ticket_is(space: Store) -> None:
    ticket, late = submit(space, new("x"), new("y"))
    assert space.now_ms is not None
    space.now_ms += 40
    assert space.step(SLOT, A, ticket=ticket, want=1).ticket_age_ms == 40
    assert space.step(SLOT, A, want=1).ticket_age_ms is None

    space.now_ms += int(space.settings.ticket_lease * 1000) + 1
    space.call_tickets()
    assert space.step(SLOT, A, ticket=late, want=1).ticket_age_ms == -1


def test_what_a_slot_counted_is_added_once(space: Store) -> None:
    space.step(SLOT, A, want=0, counts={"step:0.001": 2, "step:us": 1500})
    space.step(SLOT, A, want=0, counts={"step:0.001": 1})
    space.step(SLOT, A, want=0, mode="r", counts={"step:0.001": 1})  # as after a lost reply
    assert counted(space) == NOTHING | {"step:0.001": 3, "step:us": 1500}


def test_a_restart_begins_to_count_anew(space: Store) -> None:
    submit(space, new("x"))
    finish(space, take(space))
    space.release("alice", ["x"])
    space.restart("a test")
    assert counted(space) == NOTHING
