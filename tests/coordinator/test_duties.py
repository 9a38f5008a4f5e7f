"""The coordinator's duties, run by hand under a simulated clock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from redis.exceptions import ConnectionError

from celery_mem.coordinator import daemon
from celery_mem.coordinator.daemon import Coordinator
from celery_mem.coordinator.duty import CALLS_AT_ONCE
from celery_mem.coordinator.freeing import Freeing
from celery_mem.errors import FencedError
from celery_mem.state.audit import audit, read
from celery_mem.state.store import Store
from tests.conftest import delete_namespace
from tests.coordinator.scene import Scene
from tests.deployment import wait_until

MakeStore = Callable[..., Store]


@pytest.fixture
def scene(make_store: MakeStore) -> Any:
    scene = Scene(make_store())
    yield scene
    assert audit(scene.store) == []


def test_the_first_coordinator_leads_and_the_second_stands_by(scene: Scene) -> None:
    second = Coordinator(scene.store, scene)
    scene.run()
    assert scene.coordinator.is_leading
    assert second.run_once(0) == {}
    assert not second.is_leading


def test_a_standby_takes_over_as_soon_as_the_leader_resigns(scene: Scene) -> None:
    second = Coordinator(scene.store, scene)
    scene.run()
    second.run_once(0)
    stop = threading.Event()
    stop.set()
    scene.coordinator.run(stop)
    second.run_once(scene.store.settings.leader_lease)
    assert second.is_leading


def test_a_leader_that_was_away_too_long_writes_nothing(scene: Scene) -> None:
    scene.submit("a", "b")
    scene.run()
    scene.store.link.call(
        "UNLINK", scene.store.keys.fixed("leader")
    )  # its lease ran out while it was stopped
    second = Coordinator(scene.store, scene)
    second.run_once(0)
    assert second.is_leading
    scene.pass_time(1000)
    scene.coordinator._lead_due = scene.now_s + 1  # it was stopped just after it had asked
    before = read(scene.store)
    assert scene.run() == {}
    assert not scene.coordinator.is_leading
    assert read(scene.store) == before


@pytest.mark.parametrize("call", ["sweep", "expire_client", "call_tickets", "leave_node"])
def test_every_call_of_a_duty_is_fenced(scene: Scene, call: str) -> None:
    scene.run()
    calls: dict[str, Callable[[], object]] = {
        "sweep": lambda: scene.store.sweep("0"),
        "expire_client": lambda: scene.store.expire_client("alice", fence="0"),
        "call_tickets": lambda: scene.store.call_tickets("0"),
        "leave_node": lambda: scene.store.leave_node("node", fence="0"),
    }
    with pytest.raises(FencedError):
        calls[call]()


def test_what_a_silent_client_held_is_freed(scene: Scene) -> None:
    scene.submit("a", "b", "c", chain=True)
    scene.run()
    scene.pass_time(scene.store.settings.client_lease - 1)
    scene.run()
    assert len(scene.states()) == 3
    scene.pass_time(2)
    scene.run()
    assert scene.states() == {}
    assert read(scene.store).clients == {}


def test_a_client_that_renews_its_lease_keeps_what_it_holds(scene: Scene) -> None:
    scene.submit("a")
    for _ in range(4):
        scene.run()
        scene.pass_time(scene.store.settings.client_lease / 2)
        scene.store.renew_client("alice")
    assert scene.states() == {"a": "ready"}


def test_many_holds_are_released_in_several_runs_between_which_leadership_is_renewed(scene: Scene) -> None:
    keys = [f"k{i}" for i in range(500 * CALLS_AT_ONCE + 1)]
    for i in range(0, len(keys), 1000):
        scene.submit(*keys[i : i + 1000])
    scene.run()
    scene.pass_time(scene.store.settings.client_lease + 1)
    assert scene.run()["clients"] == CALLS_AT_ONCE
    assert len(scene.states()) == 1
    scene.pass_time(1)
    scene.run()
    assert scene.states() == {}


def test_a_lease_is_not_judged_by_a_time_in_which_nobody_could_renew_it(scene: Scene) -> None:
    scene.submit("a")
    scene.run()
    scene.pass_time(scene.store.settings.client_lease + 1)
    scene.coordinator.lose_touch()  # Redis was away; the client is about to reconnect, as everybody is
    scene.run()
    scene.pass_time(1)
    scene.run()
    assert scene.states() == {"a": "ready"}
    scene.pass_time(scene.store.settings.client_lease / 2)
    scene.run()
    assert scene.states() == {}


def test_what_a_silent_node_was_running_is_ready_again_and_calls_for_a_slot(scene: Scene) -> None:
    scene.store.heartbeat("gone", queue="queue", slots="1")
    scene.submit("a", "b")
    assert len(scene.store.step("gone|1-1.1", "gone", want=1).taken) == 1
    scene.run()
    scene.pass_time(scene.store.settings.node_lease + 1)
    scene.store.heartbeat("here", slots="2")
    scene.run()
    assert scene.states() == {"a": "ready", "b": "ready"}
    contents = read(scene.store)
    assert (contents.node_slots, contents.slots) == ({}, {})
    assert list(scene.store.link.call("ZRANGE", scene.store.keys.fixed("nodes"), 0, -1)) == [b"here"]
    assert sum(map(len, scene.sent)) == 2


def test_a_ticket_whose_message_is_lost_is_replaced_after_its_lease(scene: Scene) -> None:
    scene.store.heartbeat("node", queue="queue", slots="2")
    scene.submit("a", "b", "c")  # reserves two tickets, which nobody sends
    scene.run()
    assert scene.sent == []
    scene.pass_time(scene.store.settings.ticket_lease + 0.1)
    scene.store.heartbeat("node")
    scene.run()
    assert [[t.queue for t in tickets] for tickets in scene.sent] == [["queue", "queue"]]
    scene.pass_time(1)
    scene.run()
    assert len(scene.sent) == 1, "they are on their way"


def test_work_that_came_before_the_first_node_gets_tickets_when_one_joins(scene: Scene) -> None:
    scene.submit("a")
    scene.run()
    assert scene.sent == []
    scene.store.heartbeat("node", queue="queue", slots="1")
    scene.pass_time(1)
    scene.run()
    assert [[t.queue for t in tickets] for tickets in scene.sent] == [["queue"]]


def test_freeing_goes_on_where_a_call_spent_its_budget(make_store: MakeStore) -> None:
    scene = Scene(make_store(sweep_budget=2))
    keys = [f"k{i}" for i in range(60)]
    scene.submit(*keys, chain=True, hold=False)
    scene.store.release("alice", keys[-1:])
    assert scene.states(), "the call was to leave something to the coordinator"
    n_runs = 0
    while read(scene.store).unsettled:
        assert audit(scene.store) == []
        scene.run()
        scene.pass_time(0.1)
        n_runs += 1
    assert n_runs > 1, "one run makes a bounded number of calls"
    assert scene.states() == {}
    assert audit(scene.store) == []


def test_an_error_that_reaches_more_tasks_than_one_call_may_visit_reaches_them_all(
    make_store: MakeStore,
) -> None:
    scene = Scene(make_store(sweep_budget=2))
    keys = [f"k{i}" for i in range(30)]
    scene.submit(*keys, chain=True, hold=False)
    while read(scene.store).unsettled:
        scene.run()
        scene.pass_time(0.1)
    (taken,) = scene.store.step("s", "node", want=1).taken
    from celery_mem.state.store import Failed

    scene.store.step("s", "node", mode="iq", want=0, failed=[Failed("k0", taken.attempt, b"error", False)])
    while read(scene.store).unsettled:
        scene.run()
        scene.pass_time(0.1)
    assert scene.states()["k29"] == "erred"
    assert audit(scene.store) == []


def test_one_run_of_a_duty_is_bounded(make_store: MakeStore) -> None:
    scene = Scene(make_store(sweep_budget=1))
    keys = [f"k{i}" for i in range(100)]
    scene.submit(*keys)
    scene.store.release("alice", keys)
    freeing = Freeing(scene.store, scene)
    assert freeing.run_once("") == CALLS_AT_ONCE
    while read(scene.store).unsettled:
        freeing.run_once("")
    assert scene.states() == {}


def test_a_duty_that_fails_does_not_keep_the_others_from_theirs(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> int:
        raise ValueError("what nobody thought of")

    scene.submit("a")
    monkeypatch.setattr(scene.coordinator.duties[0], "run_once", fail)
    scene.run()
    scene.pass_time(scene.store.settings.client_lease + 1)
    assert {"clients", "nodes", "tickets"} <= scene.run().keys()
    assert scene.states() == {}


@pytest.fixture
def running(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A coordinator that runs in a thread."""
    monkeypatch.setattr(daemon, "RETRY_S", 0.01)
    store = make_store()
    store.now_ms = None
    coordinator = Coordinator(store, Scene(make_store()))
    stop = threading.Event()
    thread = threading.Thread(target=coordinator.run, args=(stop,))
    thread.start()
    wait_until(lambda: coordinator.is_leading, "the coordinator to lead")
    yield coordinator
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def test_a_coordinator_joins_the_namespace_that_is_there_after_a_reset(
    running: Coordinator, make_store: MakeStore
) -> None:
    old = running.store.generation
    delete_namespace(running.store)
    wait_until(lambda: running.is_leading and running.store.generation != old, "it to lead again")


def test_a_coordinator_outlives_a_redis_that_is_away_and_one_that_refuses(
    running: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = running.store.link._batch_once
    for error in (ConnectionError("away"), ValueError("what nobody thought of")):
        failed = threading.Event()

        def fail(_: Any, error: Exception = error, failed: threading.Event = failed) -> Any:
            failed.set()
            raise error

        monkeypatch.setattr(running.store.link, "_batch_once", fail)
        assert failed.wait(10)
        wait_until(lambda: not running.is_leading, "it to notice")
        monkeypatch.setattr(running.store.link, "_batch_once", once)
        wait_until(lambda: running.is_leading, "it to lead again")
