"""The slot loop, run by the test itself: what it takes, reports and hands back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from celery.exceptions import WorkerShutdown
from redis.exceptions import ConnectionError

from celery_mem.errors import (
    DeserializationError,
    RedisUnavailableError,
    TaskExitError,
    VersionMismatchError,
)
from celery_mem.state.audit import read
from celery_mem.state.counts import LATE, STEP, histogram
from celery_mem.state.inspect import namespace_status
from celery_mem.state.store import Taken
from celery_mem.worker.slot import Slot
from celery_mem.worker.turns import Driver
from tests.deployment import wait_until
from tests.tasks import inc
from tests.worker.conftest import Space

ran: list[Any] = []
"""What tasks of the running test noted; they run in this process."""
doors: dict[str, threading.Event] = {}
SHARED = np.zeros(1000)


@pytest.fixture(autouse=True)
def _clean_slate() -> Iterator[None]:
    ran.clear()
    doors.clear()
    yield
    for door in doors.values():
        door.set()


def note(x: Any) -> Any:
    ran.append(x)
    return x


def nap(seconds: float, x: Any) -> Any:
    time.sleep(seconds)
    return note(x)


def pass_door(name: str) -> str:
    """Wait until the test opens a door."""
    ran.append(f"at {name}")
    assert doors[name].wait(30)
    return str(note(name))


def raise_it(error: BaseException) -> None:
    raise error


def door(name: str) -> threading.Event:
    return doors.setdefault(name, threading.Event())


def take_many(slot: Slot) -> None:
    """Make a slot think that tasks are short."""
    slot.seconds_per_task = 1e-6


def run_and_leave(slot: Slot, taken: list[Taken]) -> None:
    """Run tasks and what is left of the batch, report, go home."""
    slot._run(Driver(slot), taken)
    slot._step("iq", 0)


def spy_reads(slot: Slot) -> list[Any]:
    """Return a list that fills with the keys that the slot reads."""
    reads: list[Any] = []
    call = slot.store.link.call

    def spied(*command: Any) -> Any:
        if command[0] in ("HMGET", "HGET", "GET"):
            reads.append(command[1])
        return call(*command)

    slot.store.link.call = spied  # type: ignore[method-assign]
    return reads


# --- what is taken ------------------------------------------------------------------------------------------


def test_a_ticket_without_work_ends_after_the_linger_time_and_leaves_nothing(space: Space) -> None:
    assert space.slot().run_ticket("1") == 0
    contents = read(space.store)
    assert not contents.slots
    assert not contents.idle
    assert not contents.node_slots
    assert not contents.wake


def test_a_waiting_slot_is_woken_by_new_work(space: Space) -> None:
    slot = space.slot(linger=30)
    space.in_thread(lambda: slot.run_ticket("1"))
    wait_until(lambda: read(space.store).idle, "the slot to idle")
    assert space.submit(note, 1).result(timeout=10) == 1
    slot.settings = slot.settings.replace(linger=0.01)
    assert space.submit(note, 2).result(timeout=10) == 2


def test_after_its_slice_a_slot_goes_home_and_sends_a_ticket_for_what_is_left(space: Space) -> None:
    space.store.heartbeat("node", queue="queue", slots="1")
    futures = space.map(nap, [0.02] * 40, range(40))
    slot = space.slot(slice=0.1)
    n = slot.run_ticket("1")
    assert 0 < n < 40
    assert read(space.store).slots == {}
    assert [[t.queue for t in tickets] for tickets in space.sent] == [["queue"]]
    assert space.slot().run_ticket(space.sent[0][0].id) == 40 - n
    assert space.client.gather(futures) == list(range(40))
    space.store.leave_node("node")


def test_only_the_first_of_several_late_tickets_waits_for_work(space: Space) -> None:
    slot = space.slot()
    slot.run_ticket("1")
    slot.settings = slot.settings.replace(linger=600)
    started = time.monotonic()
    for ticket in range(2, 50):
        slot.run_ticket(str(ticket))
    assert time.monotonic() - started < 300


def test_higher_priority_goes_first_then_earlier_submission_then_earlier_place(space: Space) -> None:
    futures = [space.submit(note, "first")]
    futures += space.map(note, ["low"], priority=-1)
    futures += space.map(note, ["high 1", "high 2"], priority=10)
    futures += space.map(note, ["a", "b"])
    space.slot().run_ticket("1")
    assert ran == ["high 1", "high 2", "first", "a", "b", "low"]


def test_a_slot_takes_no_more_than_its_fair_share(space: Space) -> None:
    futures = space.map(note, range(12))
    one, two, three = (space.slot() for _ in range(3))
    for slot in (one, two):
        take_many(slot)
        space.store.step(slot.name, "node", want=0)
    take_many(three)
    taken = three._step("", three._want())
    assert len(taken) == 4
    run_and_leave(three, taken)
    one.run_ticket("1")
    two.run_ticket("2")
    assert space.client.gather(futures) == list(range(12))


def test_batches_hold_only_short_tasks(space: Space) -> None:
    futures = space.map(nap, [0.01] * 10, range(10))
    slot = space.slot()
    slot.run_ticket("1")
    assert slot._want() == 1
    futures += space.map(note, range(300))
    slot.run_ticket("2")
    assert slot._want() > 10
    assert len(space.client.gather(futures)) == 310


# --- hand-back ----------------------------------------------------------------------------------------------


def test_a_long_task_in_a_batch_holds_up_neither_those_before_it_nor_those_behind_it(space: Space) -> None:
    door("long")
    before = space.map(note, [1, 2, 3])
    long = space.submit(pass_door, "long")
    behind = space.map(note, [4, 5, 6])
    one, two = space.slot(), space.slot(linger=1)
    take_many(one)
    space.in_thread(lambda: one.run_ticket("1"))
    wait_until(lambda: "at long" in ran, "the long task to run")
    assert space.client.gather(before, timeout=10) == [1, 2, 3]  # done, though their slot is not
    space.in_thread(lambda: two.run_ticket("2"))
    assert space.client.gather(behind, timeout=10) == [4, 5, 6]  # by the other slot
    assert long.status == "pending"
    two.settings = two.settings.replace(linger=0.01)
    door("long").set()
    assert long.result(timeout=10) == "long"
    assert sorted(map(str, ran)) == ["1", "2", "3", "4", "5", "6", "at long", "long"]


def test_a_report_that_does_not_arrive_while_a_long_task_runs_goes_with_the_next(
    space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    door("long")
    futures = [*space.map(note, [1, 2]), space.submit(pass_door, "long"), *space.map(note, [3])]
    slot = space.slot()
    take_many(slot)
    failed = threading.Event()
    step = slot.store.step

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is slot._watcher:
            failed.set()
            raise RedisUnavailableError("no Redis")
        return step(*args, **kwargs)

    monkeypatch.setattr(slot.store, "step", refuse)
    space.in_thread(lambda: slot.run_ticket("1"))
    assert failed.wait(10)
    door("long").set()
    assert space.client.gather(futures, timeout=10) == [1, 2, "long", 3]
    assert ran.count(1) == ran.count(2) == ran.count(3) == ran.count("long") == 1


# --- inputs and results -------------------------------------------------------------------------------------


def make_array(n: int) -> Any:
    return np.arange(n, dtype="f8")


def double_in_place(x: Any) -> float:
    x *= 2
    return float(x.sum())


def grow_shared(_: Any = None) -> Any:
    """Return an array that the next call writes into."""
    SHARED[:] += 1
    return SHARED


def test_a_dependent_in_the_same_slot_reads_nothing(space: Space) -> None:
    first = space.submit(make_array, 50_000)
    slot = space.slot()
    slot.run_ticket("1")
    space.submit(double_in_place, 0)  # so that its code is at hand
    slot.run_ticket("2")
    second = space.submit(double_in_place, first)
    reads = spy_reads(slot)
    slot.run_ticket("3")
    assert second.result(timeout=10) == 50_000 * 49_999
    assert reads == []


def test_a_dependent_in_another_slot_reads_the_result_once(space: Space) -> None:
    first = space.submit(make_array, 50_000)
    space.slot().run_ticket("1")
    futures = [space.submit(double_in_place, first, key=f"k{i}") for i in range(3)]
    slot = space.slot()
    reads = spy_reads(slot)
    slot.run_ticket("2")
    assert len(space.client.gather(futures)) == 3
    blobs = [name for name in reads if ":b:" in name]
    assert len(blobs) == 1


@pytest.mark.parametrize("n", [10, 50_000])  # inline, and a blob
def test_a_task_that_writes_into_its_input_spoils_nobodys(space: Space, n: int) -> None:
    first = space.submit(make_array, n)
    futures = [space.submit(double_in_place, first, key=f"k{i}") for i in range(3)]
    space.slot().run_ticket("1")
    assert space.client.gather(futures) == [n * (n - 1)] * 3
    assert first.result().tolist() == make_array(n).tolist()


def test_a_task_that_goes_on_writing_into_its_result_spoils_nobodys(space: Space) -> None:
    SHARED[:] = 0
    one = space.submit(grow_shared, key="one")
    two = space.submit(grow_shared, key="two")
    sums = [space.submit(np.sum, f) for f in (one, two)]
    space.slot(inline_limit=100).run_ticket("1")
    assert space.client.gather(sums) == [1000, 2000]


def test_the_cache_keeps_within_its_limit(space: Space) -> None:
    slot = space.slot(cache_bytes=100_000, inline_limit=100)
    futures = space.map(make_array, range(1000, 1040))
    sums = [space.submit(np.sum, f) for f in futures]
    slot.run_ticket("1")
    assert 50_000 < slot.runner.inputs.results.nbytes <= 100_000
    assert space.client.gather(sums) == [sum(range(n)) for n in range(1000, 1040)]


async def later(x: int) -> int:
    await asyncio.sleep(0)
    return x + 1


def test_a_coroutine_function_is_run_to_its_end(space: Space) -> None:
    futures = space.map(later, range(3))
    space.slot().run_ticket("1")
    assert space.client.gather(futures) == [1, 2, 3]


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_a_task_cannot_end_its_worker(space: Space, error: BaseException) -> None:
    future = space.submit(raise_it, error)
    slot = space.slot()
    slot.run_ticket("1")
    with pytest.raises(TaskExitError, match=type(error).__name__):
        future.result(timeout=10)


def test_a_worker_that_is_told_to_stop_in_the_middle_of_a_batch_gives_everything_back(space: Space) -> None:
    done = space.submit(note, 1)
    stop = space.submit(raise_it, WorkerShutdown(0))
    behind = space.submit(note, 2)
    slot = space.slot()
    take_many(slot)
    with pytest.raises(WorkerShutdown):
        slot.run_ticket("1")
    contents = read(space.store)
    assert {key: row.state for key, row in contents.records.items()} == {
        done.key: "memory",
        stop.key: "ready",
        behind.key: "ready",
    }
    assert contents.slots == {}
    stop.cancel()
    space.slot().run_ticket("2")
    assert behind.result(timeout=10) == 2


def test_an_error_of_the_tasks_own_redis_is_the_tasks(space: Space) -> None:
    future = space.submit(raise_it, RedisUnavailableError("of mine"))
    assert space.slot().run_ticket("1") == 1
    with pytest.raises(RedisUnavailableError, match="of mine"):
        future.result(timeout=10)


def test_code_from_another_python_or_dask_is_refused_with_both_versions_named(space: Space) -> None:
    future = space.submit(inc, 1)
    (name,) = read(space.store).code
    code = space.store.keys.of("function", name)
    _, _, body = space.store.link.call("GET", code).partition(b"\n")
    space.store.link.call("SET", code, b'{"python": [3, 2], "dask": "1.2.3"}\n' + body)
    space.slot().run_ticket("1")
    with pytest.raises(VersionMismatchError, match=r"python 3\.2 there and 3\.\d+ here, dask 1\.2\.3 there"):
        future.result(timeout=10)


def test_a_module_that_the_worker_does_not_have_is_named(space: Space) -> None:
    future = space.submit(inc, 1)
    (name,) = read(space.store).code
    code = space.store.keys.of("function", name)
    found = space.store.link.call("GET", code)
    # By reference, as pickle writes it: the module's name is as long as the real one's.
    assert b"tests.tasks" in found
    space.store.link.call("SET", code, found.replace(b"tests.tasks", b"absent_stuf"))
    space.slot().run_ticket("1")
    with pytest.raises(DeserializationError, match="'absent_stuf'"):
        future.result(timeout=10)


# --- connections --------------------------------------------------------------------------------------------


def lose_reply(slot: Slot, when: Callable[[Any], bool]) -> list[Any]:
    """Have the reply lost of the first step for which `when` holds; returns what was lost."""
    lost: list[Any] = []
    once = slot.store.link._batch_once

    def cut(commands: Any) -> Any:
        replies = once(commands)
        if commands[-1][0] == "EVALSHA" and not lost and when(replies[-1]):
            lost.append(replies[-1])
            raise ConnectionError("cut")
        return replies

    slot.store.link._batch_once = cut  # type: ignore[method-assign]
    return lost


def test_tasks_that_a_lost_reply_gave_are_run_once(space: Space) -> None:
    futures = space.map(note, range(50))
    slot = space.slot()
    take_many(slot)
    lost = lose_reply(slot, lambda reply: len(reply[0]) > 1)
    slot.run_ticket("1")
    assert lost
    assert space.client.gather(futures, timeout=10) == list(range(50))
    assert sorted(ran) == list(range(50))


def test_a_report_whose_reply_was_lost_counts_once(space: Space) -> None:
    futures = space.map(note, range(5))
    slot = space.slot()
    lost = lose_reply(slot, lambda reply: bool(ran))
    assert slot.run_ticket("1") == 5
    assert lost
    assert space.client.gather(futures, timeout=10) == list(range(5))
    assert sorted(ran) == list(range(5))


def test_what_a_slot_that_was_given_up_reports_changes_nothing(space: Space) -> None:
    door("slow")
    future = space.submit(pass_door, "slow")
    one, two = space.slot(), space.slot()
    thread = space.in_thread(lambda: one.run_ticket("1"))
    wait_until(lambda: "at slow" in ran, "the task to run")
    space.store.abandon_slot(one.name, "node", "", {})
    two.batch.begin(two._step("", 1))  # taken by another slot, under another attempt
    door("slow").set()
    thread.join()
    assert read(space.store).records[future.key].state == "processing"
    run_and_leave(two, [])
    assert future.result(timeout=10) == "slow"
    assert ran.count("slow") == 2


def test_a_large_result_that_came_too_late_is_removed(space: Space) -> None:
    door("slow")
    space.submit(pass_door, "slow", priority=1)
    future = space.submit(make_array, 50_000)
    slot = space.slot()
    (taken,) = slot._step("", 1)[:1]
    door("slow").set()
    slot._run(Driver(slot), [taken])
    slot._run(Driver(slot), slot._step("", 1))  # the array, stored and not reported yet
    assert len(read(space.store).blobs) == 1
    future.cancel()
    slot._step("iq", 0)
    assert read(space.store).blobs == {}


def test_a_slot_tells_how_long_its_steps_and_tickets_took(space: Space) -> None:
    slot = space.slot()
    slot.run_ticket("")
    future = space.submit(inc, 1)
    slot.run_ticket("of a time before")
    assert future.result(timeout=10) == 2

    counts = namespace_status(space.store)["counts"]
    assert counts[LATE] == 1
    steps = histogram(counts, STEP)
    assert steps.buckets[-1][1] >= 1
    assert steps.total_s > 0


def test_what_a_slot_counted_outlives_a_step_that_failed(
    space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = space.slot()
    slot.run_ticket("")
    before = histogram(namespace_status(space.store)["counts"], STEP).buckets[-1][1]

    def away(*args: Any, **kwargs: Any) -> Any:
        raise RedisUnavailableError("away")

    with monkeypatch.context() as patch:
        patch.setattr(slot.store, "step", away)
        with pytest.raises(RedisUnavailableError):
            slot.run_ticket("t")
    slot.run_ticket("")
    after = histogram(namespace_status(space.store)["counts"], STEP).buckets[-1][1]
    assert after > before
